"""An emulated network: a wrapper around any communicator, over which everything takes as long as it would there."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from commhub.protocol._collectives import Subgroup

    from ._communicator import Communicator, Flight
    from ._job import Job
    from ._network import Network


def emulate(communicator: Communicator, network: Network | None) -> Communicator:
    """The same communicator over a network, in place of the one that it was emulated over before.

    Args:
        communicator: the bare one, or what this function returned.
        network: which; ``None`` gives the bare one back.
    """
    bare = communicator.bare if isinstance(communicator, EmulatedLink) else communicator
    return bare if network is None else EmulatedLink(bare, network)


def network_of(communicator: Communicator) -> Network | None:
    """The network that a communicator is emulated over; ``None`` where it is over none."""
    return communicator.network if isinstance(communicator, EmulatedLink) else None


class EmulatedLink:
    """A communicator whose collectives have not ended before they could have on a network.

    The link carries one message after another: the next one's bytes follow the last one's, and the latency of one
    overlaps with the bytes of the next. What a rank does alone takes no time.

    Args:
        bare: what carries the collectives out.
        network: how long they take.
    """

    def __init__(self, bare: Communicator, network: Network) -> None:
        self.bare, self.network = bare, network
        self.rank, self.size = bare.rank, bare.size
        self._free_at = 0.0

    def connect(self, groups: Sequence[Sequence[int]]) -> Sequence[Subgroup]:
        """Communicators among each of the groups, over the same link."""
        return self.bare.connect(groups)

    def launch(self, job: Job) -> Flight:
        """Start a collective; nothing blocks."""
        now = time.monotonic()
        flight = self.bare.launch(job)
        if job.p == 1:
            return flight
        self._free_at = max(now, self._free_at) + self.network.occupied(job.sent_bytes)
        return HeldBack(flight, self._free_at + self.network.latency)

    def abort(self, seconds: float) -> bool:
        """End all that is in flight; whether it has ended within so many seconds."""
        return self.bare.abort(seconds)

    def close(self) -> None:
        """Give the groups up."""
        self.bare.close()


class HeldBack:
    """A flight that has not ended before its time has come.

    Args:
        flight: the real one.
        until: its time, in seconds of ``time.monotonic()``.
    """

    def __init__(self, flight: Flight, until: float) -> None:
        self._flight, self._until = flight, until

    def is_done(self) -> bool:
        """Whether the real one has ended, well or badly, and its time has come."""
        return time.monotonic() >= self._until and self._flight.is_done()

    def wait(self, seconds: float) -> None:
        """Block until the real one makes progress, or until its time, at most this long."""
        left = self._until - time.monotonic()
        if not self._flight.is_done():
            self._flight.wait(seconds)
        elif left > 0:
            time.sleep(min(left, seconds))

    def result(self) -> Tensor:
        """What came of the real one."""
        return self._flight.result()
