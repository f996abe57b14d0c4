"""Collectives over Gloo, on a group of the registration's own.

The group is made from the store alone, so only its members take part, and DDP's own collectives never meet a
hook's. Gloo's reduce-scatter sends a whole all-reduce and its large all-to-all and all-gather stall (measured: up to
2.3 and 2.0 times the link's time), so the first is an all-to-all with a local sum here, and the others go in pieces.
"""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import attrs
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, Store, Work

from commhub.protocol._collectives import (
    AllGather,
    AllReduce,
    AllToAll,
    Broadcast,
    Collective,
    ReduceScatter,
    Subgroup,
)

from ._graveyard import bury
from ._job import Job, sum_shares, way
from ._meeting import compare, connect
from ._threads import are_at_rest

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ._board import FailureBoard

PIECE = 1 << 20
"""Bytes of payload in one piece of a large all-gather or all-to-all."""

_UNUSED_TAG = 0xAB0
"""Of a message that nobody sends."""
_GLOO_THREAD = "pt_gloo_runloop"
"""The name of the threads in which Gloo's collectives run."""
_ENDS_SOON = 0.05
"""Seconds in which a collective ends whose connections are closed, if it ever does; it takes a millisecond or two."""


@attrs.define(eq=False)
class _Piece:
    """A stretch of a collective in flight: ``out`` holds p shares of it when ``work`` is done."""

    work: Work
    out: Tensor
    kept: Tensor  # the input, alive until the work is done


class GlooFlight:
    """One job on its way, in pieces.

    Attributes:
        job: which one.
        pieces: what is in flight of it; none where the rank is alone or there is nothing to send.
        finish: what comes of the pieces when all have ended.
    """

    def __init__(self, job: Job) -> None:
        self.job = job
        self.pieces: list[_Piece] = []
        self.finish: Callable[[GlooFlight], Tensor] = GlooFlight.payload

    def keep(self, work: Work, out: Tensor, kept: Tensor) -> None:
        """Add a piece that was just issued.

        Args:
            work: what Gloo calls it.
            out: where its result comes.
            kept: its input.
        """
        self.pieces.append(_Piece(work, out, kept))

    def is_done(self) -> bool:
        """Whether every piece has ended, well or badly."""
        return all(piece.work.is_completed() for piece in self.pieces)

    def wait(self, seconds: float) -> None:
        """Block until the first piece that has not ended does, at most this long. Raises nothing."""
        for piece in self.pieces:
            if not piece.work.is_completed():
                try:
                    piece.work.wait(datetime.timedelta(seconds=seconds))
                except RuntimeError:  # either the time is up, or the piece failed and result() says so
                    return

    def result(self) -> Tensor:
        """The collective's result as it travelled: 1-D.

        Raises:
            RuntimeError: what Gloo says, for instance that a peer closed its connection.
        """
        for piece in self.pieces:
            piece.work.wait()
        return self.finish(self) if self.pieces else self.job.alone()

    def payload(self) -> Tensor:
        """What is in the payload by then."""
        return self.job.payload

    def assembled(self) -> Tensor:
        """The pieces side by side: p shares, in group-rank order, 1-D."""
        if len(self.pieces) == 1:
            whole = self.pieces[0].out
        else:
            whole = torch.cat([piece.out.view(self.job.p, -1) for piece in self.pieces], dim=1).view(-1)
        return whole.view(self.job.payload.dtype)

    def summed(self) -> Tensor:
        """The sum of the p shares, in group-rank order."""
        return sum_shares(list(self.assembled().view(self.job.p, -1)))


Finish = Callable[[GlooFlight], Tensor]
"""What comes of a flight's pieces when all have ended: 1-D, as it travelled."""


class GlooCommunicator:
    """A Gloo group among all ranks of a registration, and those that its hook asked for.

    Args:
        store: where the members meet; a prefix that no other communicator uses.
        rank, size: in the registration's group.
        timeout: seconds after which Gloo gives a collective up.
        board: where peers say that they fail while the ranks are being connected.
        connects_within: seconds that the ranks wait for each other; default: as long as for a collective.
    """

    def __init__(
        self,
        store: Store,
        rank: int,
        size: int,
        timeout: float,
        board: FailureBoard | None = None,
        connects_within: float | None = None,
    ) -> None:
        self.rank, self.size = rank, size
        self._store, self._board = store, board
        connects = timeout if connects_within is None else connects_within
        self._timeouts = datetime.timedelta(seconds=connects), datetime.timedelta(seconds=timeout)
        self._groups: dict[Subgroup | None, Any] = {}  # ProcessGroupGloo, whose stub lacks its collectives
        self._flights: list[GlooFlight] = []
        self._partitions = 0
        self._join(None, store, range(size))

    def connect(self, groups: Sequence[Sequence[int]]) -> tuple[Subgroup, ...]:
        """Communicators among each of the groups; every rank calls this with the same ones, in the same order.

        Raises:
            HookMismatchError: if another rank asks for others.
            Unmet: if ranks do not come.
        """
        self._partitions += 1
        place = PrefixStore(str(self._partitions), self._store)
        seconds = self._timeouts[0].total_seconds()
        compare(place, self.rank, self.size, [list(ranks) for ranks in groups], seconds, self._board)
        made = tuple(Subgroup(tuple(ranks), self._partitions) for ranks in groups)
        for group in made:
            if self.rank in group.ranks:
                self._join(group, PrefixStore(".".join(map(str, group.ranks)), place), group.ranks)
        return made

    def _join(self, group: Subgroup | None, store: Store, ranks: Sequence[int]) -> None:
        if len(ranks) > 1:
            self._groups[group] = connect(store, ranks, ranks.index(self.rank), self._timeouts, self._board)

    def launch(self, job: Job) -> GlooFlight:
        """Start a job; nothing blocks.

        Raises:
            HookError: for a kind that is not known here.
        """
        issue = way(WAYS, job.kind, "by the thread driver, over Gloo")
        self._flights = [f for f in self._flights if not f.is_done()]
        flight = GlooFlight(job)
        if job.p > 1 and job.payload.numel():
            self._flights.append(flight)  # before anything is on its way, so that abort knows of it
            flight.finish = issue(flight, self._groups[job.group])
        return flight

    def abort(self, seconds: float) -> bool:
        """End all that is in flight in any of the groups; whether it has ended within so many seconds.

        Gloo's own ``abort`` and ``shutdown`` leave a collective running: it goes on writing whenever its peer sends
        more. What ends it is a receive that runs out of time, upon which Gloo closes every connection of the group; a
        receive over a connection that is closed already fails at once and closes nothing, so every peer is tried.

        One thing Gloo forgets to wake: a message that its peer was ready for, and that had not gone out as a whole when
        the connection closed. It sleeps until the group's timeout, and then fails. It can neither send nor receive, so
        it counts as ended when Gloo's threads are at rest.
        """
        for group, backend in self._groups.items():
            size = self.size if group is None else len(group)
            own = self.rank if group is None else group.ranks.index(self.rank)
            for distance in range(1, size):
                peer = (own + distance) % size
                with contextlib.suppress(RuntimeError):  # which it is meant to raise
                    backend.recv([torch.empty(1)], peer, _UNUSED_TAG).wait(datetime.timedelta(milliseconds=1))
        end = time.monotonic() + seconds
        soon = time.monotonic() + _ENDS_SOON
        while not self.is_idle() and time.monotonic() < end:
            if time.monotonic() > soon and are_at_rest(_GLOO_THREAD, 0.02):
                return True
            time.sleep(0.001)
        return self.is_idle()

    def close(self) -> None:
        """Give the groups up. Where a collective is stuck, they are kept until it ends; nothing blocks."""
        if self._groups:
            bury(self)

    def is_idle(self) -> bool:
        """Whether nothing is in flight."""
        return all(flight.is_done() for flight in self._flights)

    def free(self) -> None:
        """Let go of the groups; nothing may be in flight."""
        self._flights.clear()
        self._groups.clear()

    def abandon(self) -> None:
        """Keep the groups, and what is in flight in them, for as long as the process lives."""
        for kept in (*self._groups.values(), *(p.work for f in self._flights for p in f.pieces)):
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(kept))


def _all_reduce(flight: GlooFlight, group: Any) -> Finish:
    payload = flight.job.payload
    flight.keep(group.allreduce([payload], dist.AllreduceOptions()), payload, payload)
    return GlooFlight.payload


def _broadcast(flight: GlooFlight, group: Any) -> Finish:
    payload = flight.job.payload
    options = dist.BroadcastOptions()
    options.rootRank = cast("Broadcast", flight.job.asked).src
    flight.keep(group.broadcast([_octets(payload)], options), payload, payload)
    return GlooFlight.payload


def _all_gather(flight: GlooFlight, group: Any) -> Finish:
    for cut in torch.split(_octets(flight.job.payload), PIECE):
        out = cut.new_empty(flight.job.p * cut.numel())
        flight.keep(group._allgather_base(out, cut), out, cut)
    return GlooFlight.assembled


def _all_to_all(flight: GlooFlight, group: Any) -> Finish:
    p = flight.job.p
    for columns in torch.split(_octets(flight.job.payload).view(p, -1), max(1, PIECE // p), dim=1):
        cut = columns.reshape(-1)
        out = torch.empty_like(cut)
        flight.keep(group.alltoall_base(out, cut, [], [], dist.AllToAllOptions()), out, cut)
    return GlooFlight.assembled


def _reduce_scatter(flight: GlooFlight, group: Any) -> Finish:
    _all_to_all(flight, group)
    return GlooFlight.summed


def _octets(payload: Tensor) -> Tensor:
    """What is only moved may have any dtype."""
    return payload.view(torch.uint8)


WAYS: dict[type[Collective], Callable[[GlooFlight, Any], Finish]] = {
    AllReduce: _all_reduce,
    ReduceScatter: _reduce_scatter,
    AllGather: _all_gather,
    AllToAll: _all_to_all,
    Broadcast: _broadcast,
}
"""How each kind is issued in a ``ProcessGroupGloo``: the flight keeps what is issued; the function that is returned
makes the result of it when all has ended."""
