"""The life of one rank's process: take an order, become that rank, call, answer; and again, unless fresh."""

import contextlib
import ctypes
import faulthandler
import os
import signal
import sys
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any

import attrs

from commhub.testing import _context, _isolation

from ._outcome import RankFailure
from ._transport import Call, dumps

STACKS_SIGNAL = signal.SIGUSR1
_PR_SET_PDEATHSIG = 1


@attrs.frozen(kw_only=True)
class Order:
    """One call on one rank."""

    call: Call
    surroundings: _isolation.Surroundings
    rank: int = 0
    world_size: int = 1
    port: int = 0
    prefix: str = ""
    init: bool = False
    destroy: bool = False


@attrs.frozen(kw_only=True)
class Answer:
    """What came of an order: a value's bytes, or a failure."""

    value: bytes | None = None
    failure: RankFailure | None = None


def settle(output: int, server: int) -> None:
    """Tie this new process to its server and its output file."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != server:  # the server ended before the line above
        os._exit(1)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.close(output)
    faulthandler.enable(file=2)
    faulthandler.register(STACKS_SIGNAL, file=2, all_threads=True, chain=False)
    _isolation.remember()


def live(channel: Connection, *, fresh: bool) -> None:
    """Serve orders until the parent is gone; if ``fresh``, one order, whose exception then ends the process."""
    while True:
        try:
            order: Order = channel.recv()
        except (EOFError, OSError):
            os._exit(0)
        try:
            answer = Answer(value=_carry_out(order))
        except BaseException as error:
            if fresh and isinstance(error, SystemExit):
                raise
            _send(channel, Answer(failure=RankFailure.of(error)))
            if fresh:
                raise
        else:
            _send(channel, answer)
        _context.set_current(None)
        if fresh:
            return


def _send(channel: Connection, answer: Answer) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    with contextlib.suppress(OSError):
        channel.send(answer)


def _carry_out(order: Order) -> bytes:
    _isolation.reset(order.surroundings)
    with _membership(order):
        value: Any = dumps(order.call())
        if order.destroy:
            _isolation.collect()
    return bytes(value)


@contextlib.contextmanager
def _membership(order: Order) -> Iterator[None]:
    """Be this rank, in a process group of its own for the call; after a failure the whole process ends."""
    import torch.distributed as dist

    rank = _context.Rank(rank=order.rank, world_size=order.world_size, port=order.port, prefix=order.prefix)
    _context.set_current(rank)
    store = rank.connect("group") if order.init else None
    if store is not None:
        dist.init_process_group("gloo", store=store, rank=order.rank, world_size=order.world_size)
        rank.meet(store, "the start")  # a rank that dies at once would break a peer that still connects
    yield
    if order.destroy and dist.is_initialized():
        if store is not None:
            rank.meet(store, "the end")  # a group that ends while a peer still connects or receives breaks that peer
        dist.destroy_process_group()
