"""Waiting for ranks: their answers, their deaths, or the moment when waiting makes no more sense."""

import signal
import time
from collections.abc import Sequence
from multiprocessing.connection import wait

import attrs

from ._forkserver import ForkServer, RankProcess
from ._outcome import RankFailure, death
from ._worker import STACKS_SIGNAL, Answer

EXCEPTION_GRACE = 2.0  # seconds in which a peer may still tell its side, after a rank's exception
DEATH_GRACE = 0.5  # the same after a death, which peers notice as a broken connection


@attrs.define(kw_only=True)
class Gathered:
    """What was learnt of the ranks of one call."""

    answers: dict[int, Answer] = attrs.field(factory=dict)
    errors: dict[int, RankFailure] = attrs.field(factory=dict)
    stacks: dict[int, str] = attrs.field(factory=dict)
    outputs: dict[int, str] = attrs.field(factory=dict)


def gather(
    server: ForkServer, ranks: Sequence[RankProcess], *, fresh: bool, timeout: float, grace: float | None
) -> Gathered:
    """Wait until each rank answered (``fresh``: ended), one failed and the grace is over, or ``timeout``."""
    found = Gathered()
    pending = set(range(len(ranks)))
    open_channels = set(pending)
    deadline = time.monotonic() + timeout

    def listen(rank: int) -> None:
        nonlocal deadline
        try:
            answer: Answer = ranks[rank].channel.recv()
        except (EOFError, OSError):
            open_channels.discard(rank)
            return
        found.answers[rank] = answer
        if answer.failure is not None:
            found.errors[rank] = answer.failure
            deadline = min(deadline, time.monotonic() + (EXCEPTION_GRACE if grace is None else grace))
        if not fresh:
            pending.discard(rank)

    while pending:
        channels = {ranks[rank].channel: rank for rank in pending & open_channels}
        ready = wait([server.control, *channels], max(0.0, deadline - time.monotonic()))
        if not ready:
            break
        for channel, rank in channels.items():
            if channel in ready:
                listen(rank)
        if server.control in ready:
            server.read_notices()
        for rank in sorted(pending):
            status = ranks[rank].status
            if status is None:
                continue
            while rank in open_channels and ranks[rank].channel.poll():  # it may have answered and then died
                listen(rank)
            pending.discard(rank)
            if status != 0 or not fresh:
                found.errors.setdefault(rank, death(status))
            if status != 0:
                deadline = min(deadline, time.monotonic() + (DEATH_GRACE if grace is None else grace))
    if not found.errors:
        late = RankFailure("TimeoutError", f"no answer within {timeout:g} s", "")
        found.errors.update(dict.fromkeys(pending, late))
    for rank in pending:
        found.outputs[rank] = ranks[rank].written()
    _dump_stacks(server, [(rank, ranks[rank]) for rank in sorted(pending)], found)
    return found


def _dump_stacks(server: ForkServer, silent: list[tuple[int, RankProcess]], found: Gathered) -> None:
    """Have each silent rank write its Python stacks, from a signal handler in C: it may be stuck anywhere."""
    before = {rank: process.output.seek(0, 2) for rank, process in silent}
    for _, process in silent:
        server.signal(process, STACKS_SIGNAL)
    sizes: dict[int, int] = {}
    for _ in range(20):
        if not silent or (all(sizes.get(r, 0) > before[r] for r in before) and sizes == _sizes(silent)):
            break
        sizes = _sizes(silent)
        time.sleep(0.05)
    for rank, process in silent:
        found.stacks[rank] = process.written(before[rank])


def _sizes(silent: list[tuple[int, RankProcess]]) -> dict[int, int]:
    return {rank: process.output.seek(0, 2) for rank, process in silent}


def kill(server: ForkServer, ranks: Sequence[RankProcess]) -> None:
    """End these processes and wait until they are gone."""
    for process in ranks:
        server.signal(process, signal.SIGKILL)
    server.reap(list(ranks))
