"""Faults of a link, for tests: on the rank that asks for it, a collective is late, lost, corrupt or failed.

    with faults({2: Lost()}):  # the third collective that this rank's driver launches
        registration = commhub.register(model, hook, timeout=1)

The other ranks see what they would see of such a link: a peer that comes late, reports an error, or goes on with other
numbers. A driver keeps its faults as long as it lives; after a ``swap`` outside of the ``with`` there are none.
"""

from __future__ import annotations

import contextlib
import threading
import time
from typing import TYPE_CHECKING, Protocol
from unittest.mock import patch

import attrs
import torch

from commhub.drivers import _driver
from commhub.drivers._link import HeldBack

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from typing import Any

    from torch import Tensor

    from commhub.drivers._communicator import Communicator, Flight
    from commhub.drivers._driver import Driver
    from commhub.drivers._job import Job
    from commhub.protocol._collectives import Subgroup


class Fault(Protocol):
    """What happens to a collective."""

    def launch(self, communicator: Communicator, job: Job) -> Flight:
        """Start it, or only seem to; nothing blocks."""


@attrs.frozen
class Late:
    """It ends so many seconds after it was launched, or later, and well."""

    seconds: float

    def launch(self, communicator: Communicator, job: Job) -> Flight:
        """Start it, and hold it back."""
        return HeldBack(communicator.launch(job), time.monotonic() + self.seconds)


@attrs.frozen
class Lost:
    """The peers hear of this rank, and it never hears of them: it does not end until the communicator is aborted."""

    def launch(self, communicator: Communicator, job: Job) -> Flight:
        """Start it, and forget how it ended."""
        return _Lost(communicator.launch(job))


@attrs.frozen
class Corrupt:
    """It ends well, and in one byte of its result some bits are turned over.

    Attributes:
        byte: which, counted from the result's first.
        bits: a mask.
    """

    byte: int = 0
    bits: int = 0xFF

    def launch(self, communicator: Communicator, job: Job) -> Flight:
        """Start it."""
        return _Corrupt(communicator.launch(job), self)


@attrs.frozen
class Failed:
    """It ends badly, before anything was sent, with a RuntimeError of this text."""

    text: str

    def launch(self, communicator: Communicator, job: Job) -> Flight:  # noqa: ARG002 - nothing is sent
        """Only seem to start it."""
        return _Failed(self.text)


class Faulty:
    """A communicator on which some collectives go wrong.

    Args:
        bare: what carries the collectives out.
        at: which go wrong, by the number of those that were launched on this rank before, and how.
    """

    def __init__(self, bare: Communicator, at: Mapping[int, Fault]) -> None:
        self.bare, self.at = bare, at
        self.rank, self.size = bare.rank, bare.size
        self.launched = 0
        self._lost: list[_Lost] = []

    def connect(self, groups: Sequence[Sequence[int]]) -> Sequence[Subgroup]:
        """Communicators among each of the groups; collectives in them count too."""
        return self.bare.connect(groups)

    def launch(self, job: Job) -> Flight:
        """Start a collective, as its fault has it."""
        fault = self.at.get(self.launched)
        self.launched += 1
        flight = self.bare.launch(job) if fault is None else fault.launch(self.bare, job)
        if isinstance(flight, _Lost):
            self._lost.append(flight)
        return flight

    def abort(self, seconds: float) -> bool:
        """End all that is in flight, what was lost included."""
        for flight in self._lost:
            flight.over.set()
        return self.bare.abort(seconds)

    def close(self) -> None:
        """Give the groups up, and what was lost in them: it would keep their connections open."""
        self._lost.clear()
        self.bare.close()


@attrs.frozen
class _Lost:
    flight: Flight
    over: threading.Event = attrs.Factory(threading.Event)

    def is_done(self) -> bool:
        return self.over.is_set()

    def wait(self, seconds: float) -> None:
        self.over.wait(seconds)

    def result(self) -> Tensor:
        raise RuntimeError("this collective was lost, and given up")


@attrs.frozen
class _Corrupt:
    flight: Flight
    fault: Corrupt

    def is_done(self) -> bool:
        return self.flight.is_done()

    def wait(self, seconds: float) -> None:
        self.flight.wait(seconds)

    def result(self) -> Tensor:
        result = self.flight.result()
        result.view(-1).view(torch.uint8)[self.fault.byte] ^= self.fault.bits
        return result


@attrs.frozen
class _Failed:
    text: str

    def is_done(self) -> bool:
        return True

    def wait(self, seconds: float) -> None:
        pass

    def result(self) -> Tensor:
        raise RuntimeError(self.text)


@contextlib.contextmanager
def faults(at: Mapping[int, Fault]) -> Iterator[list[Faulty]]:
    """Drivers for gradients in host memory that are made meanwhile have these faults on this rank.

    Args:
        at: by the number of collectives that the driver has launched before. A step under ``allreduce`` launches one
            for each bucket and, to confirm the step, one more.

    Yields:
        The communicators that were made, oldest first.
    """
    made: list[Faulty] = []
    former = _driver.BY_DEVICE["cpu"]

    def make(**given: Any) -> Driver:
        driver: Any = former(**given)
        driver.communicator = Faulty(driver.communicator, at)
        made.append(driver.communicator)
        return driver  # type: ignore[no-any-return]

    with patch.dict(_driver.BY_DEVICE, {"cpu": make}):
        yield made
