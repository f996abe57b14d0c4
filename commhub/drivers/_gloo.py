"""Collectives over Gloo, on a group of the registration's own.

The group is made from the store alone, so only its members take part, and DDP's own collectives never meet a
hook's. Gloo's reduce-scatter sends a whole all-reduce and its large all-to-all and all-gather stall (measured: up to
2.3 and 2.0 times the link's time), so the first is an all-to-all with a local sum here, and the others go in pieces.
"""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import threading
import time
from typing import TYPE_CHECKING, Any

import attrs
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, ProcessGroupGloo, Store, Work

from commhub.protocol._collectives import AllGather, AllReduce, Broadcast, ReduceScatter, Subgroup

from ._job import Job, sum_shares
from ._threads import are_at_rest

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

PIECE = 1 << 20
"""Bytes of payload in one piece of a large all-gather or all-to-all."""

_UNUSED_TAG = 0xAB0
"""Of a message that nobody sends."""
_GLOO_THREAD = "pt_gloo_runloop"
"""The name of the threads in which Gloo's collectives run."""
_ENDS_SOON = 0.05
"""Seconds in which a collective ends whose connections are closed, if it ever does; it takes a millisecond or two."""

_sweeping = threading.Lock()
_graveyard: list[GlooCommunicator] = []
"""Closed communicators with a collective that has not ended: Gloo's destructor would wait for it."""


@attrs.define(eq=False)
class _Piece:
    """A stretch of a collective in flight: ``out`` holds p shares of it when ``work`` is done."""

    work: Work
    out: Tensor
    kept: Tensor  # the input, alive until the work is done


class GlooFlight:
    """One job on its way, in pieces."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.pieces: list[_Piece] = []
        self.not_before = 0.0

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
        job = self.job
        if job.kind in (AllReduce, Broadcast):
            return job.payload
        if not self.pieces:
            return job.payload.clone()
        gathered = self._assembled()
        if job.kind is ReduceScatter:
            return sum_shares(list(gathered.view(job.payload.dtype).view(job.p, -1)))
        return gathered.view(job.payload.dtype)

    def _assembled(self) -> Tensor:
        if len(self.pieces) == 1:
            return self.pieces[0].out
        return torch.cat([piece.out.view(self.job.p, -1) for piece in self.pieces], dim=1).view(-1)


class GlooCommunicator:
    """A Gloo group among all ranks of a registration, and those that its hook asked for.

    Args:
        store: where the members meet; a prefix that no other communicator uses.
        rank, size: in the registration's group.
        timeout: seconds after which Gloo gives a collective up.
    """

    def __init__(self, store: Store, rank: int, size: int, timeout: float) -> None:
        self.rank, self.size = rank, size
        self._store = store
        self._timeout = datetime.timedelta(seconds=timeout)
        self._groups: dict[Subgroup | None, Any] = {}  # ProcessGroupGloo, whose stub lacks its collectives
        self._flights: list[GlooFlight] = []
        self._partitions = 0
        self._join(None, store, rank, size)

    def connect(self, groups: Sequence[Sequence[int]]) -> tuple[Subgroup, ...]:
        """Communicators among each of the groups; every rank calls this with the same ones, in the same order."""
        self._partitions += 1
        made = tuple(Subgroup(tuple(ranks), self._partitions) for ranks in groups)
        for group in made:
            if self.rank in group.ranks:
                name = f"{self._partitions}/{'.'.join(map(str, group.ranks))}"
                self._join(group, PrefixStore(name, self._store), group.ranks.index(self.rank), len(group))
        return made

    def _join(self, group: Subgroup | None, store: Store, rank: int, size: int) -> None:
        if size > 1:
            self._groups[group] = ProcessGroupGloo(store, rank, size, self._timeout)

    def launch(self, job: Job) -> GlooFlight:
        """Start a job; nothing blocks."""
        self._flights = [f for f in self._flights if not f.is_done()]
        flight = GlooFlight(job)
        if job.p > 1 and job.payload.numel():
            self._flights.append(flight)  # before anything is on its way, so that abort knows of it
            for piece in self._pieces(job, self._groups[job.group]):
                flight.pieces.append(piece)
        return flight

    def _pieces(self, job: Job, group: Any) -> Iterator[_Piece]:
        payload = job.payload
        if job.kind is AllReduce:
            yield _Piece(group.allreduce([payload], dist.AllreduceOptions()), payload, payload)
            return
        octets = payload.view(torch.uint8)  # what is only moved may have any dtype
        if job.kind is Broadcast:
            options = dist.BroadcastOptions()
            options.rootRank = job.src
            yield _Piece(group.broadcast([octets], options), payload, payload)
            return
        if job.kind is AllGather:
            cuts = torch.split(octets, PIECE)
        else:
            table = octets.view(job.p, -1)
            columns = max(1, PIECE // job.p)
            cuts = tuple(part.reshape(-1) for part in torch.split(table, columns, dim=1))
        for cut in cuts:
            if job.kind is AllGather:
                out = cut.new_empty(job.p * cut.numel())
                yield _Piece(group._allgather_base(out, cut), out, cut)
            else:
                out = torch.empty_like(cut)
                yield _Piece(group.alltoall_base(out, cut, [], [], dist.AllToAllOptions()), out, cut)

    def abort(self, seconds: float) -> bool:
        """End all that is in flight in any of the groups; whether it has ended within so many seconds.

        Gloo's own ``abort`` and ``shutdown`` leave a collective running: it goes on writing whenever its peer sends
        more. What ends it is a receive that runs out of time, upon which Gloo closes every connection of the group; a
        receive over a connection that is closed already fails at once and closes nothing, so every peer is tried.

        One thing Gloo forgets to wake: a message of which a part was on its way when its connection closed. It sleeps
        until the group's timeout, and then fails. It can neither send nor receive, so it counts as ended when Gloo's
        threads are at rest.
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
        while not self._is_idle() and time.monotonic() < end:
            if time.monotonic() > soon and are_at_rest(_GLOO_THREAD, 0.02):
                return True
            time.sleep(0.001)
        return self._is_idle()

    def close(self) -> None:
        """Give the group up. Where a collective is stuck, the group is kept until it ends; nothing blocks."""
        with _sweeping:
            if self._groups and self not in _graveyard:
                _graveyard.append(self)
        sweep()

    def _is_idle(self) -> bool:
        return all(flight.is_done() for flight in self._flights)


def sweep(at_exit: bool = False) -> None:
    """Free the closed groups whose collectives have ended. At exit, the others are left to the operating system."""
    with _sweeping:  # of two threads that free one, the other would find it gone
        closed, idle = list(_graveyard), [one for one in _graveyard if one._is_idle()]
        _graveyard[:] = [one for one in closed if one not in idle]
    for one in closed:
        if one in idle:
            one._flights.clear()
            one._groups.clear()
        elif at_exit:
            for kept in (*one._groups.values(), *(p.work for f in one._flights for p in f.pieces)):
                ctypes.pythonapi.Py_IncRef(ctypes.py_object(kept))
