"""What happened in the last steps: one record, from which figures, traces and cost models are made.

It is always on. A bucket costs two small objects for each stage and a reading of the clock for each of their times,
of which the figures needed most before.
"""

from __future__ import annotations

import time
from collections import deque
from typing import TYPE_CHECKING

import attrs

from . import _ranges
from ._records import BucketRecord, StageRecord
from ._stats import StepStats

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from commhub.protocol._bucket import Bucket

    from ._job import Job
    from ._records import Interval, Purpose

KEPT = 16
"""How many steps are kept."""


@attrs.define(eq=False)
class Round:
    """What was carried out between two times at which training had waited for all of it.

    Attributes:
        buckets: in the order in which training submitted them.
        waits: when the driver waited for collectives with nothing else to do.
        blocked: when training stood still for the driver.
    """

    buckets: list[BucketRecord] = attrs.Factory(list)
    waits: list[Interval] = attrs.Factory(list)
    blocked: list[Interval] = attrs.Factory(list)

    def figures(self) -> StepStats:
        """Its bytes and seconds."""
        logical = sent = 0.0
        encodes: list[Interval] = []
        decodes: list[Interval] = []
        for bucket in self.buckets:
            logical += bucket.logical_bytes
            for stage in bucket.stages:
                encodes.append(stage.encode)
                if stage.issued is not None:
                    sent += stage.sent_bytes
            if bucket.decode is not None:
                decodes.append(bucket.decode)
        phases = {"encode": encodes, "wait": self.waits, "decode": decodes}
        encode, wait, decode = (sum([end - start for start, end in phase]) for phase in phases.values())
        exposed = {name: self._exposed(phase) for name, phase in phases.items()}
        return StepStats(logical, sent, encode, wait, decode, exposed)

    def _exposed(self, phase: Iterable[Interval]) -> float:
        seconds = 0.0
        for since, until in self.blocked:
            for start, end in phase:
                if start < until and end > since:
                    seconds += min(end, until) - max(start, since)
        return seconds


@attrs.define(eq=False)
class StepRecord:
    """One step, and the averages of parameters that followed it.

    Attributes:
        step: its number, as a ``Bucket`` has it.
        began: when its first bucket was ready, monotonic seconds.
        ended: when training last went on after it.
    """

    step: int
    began: float
    ended: float
    _rounds: list[Round] = attrs.field(factory=list, init=False)

    @property
    def buckets(self) -> tuple[BucketRecord, ...]:
        """All of its buckets; those whose ``purpose`` is ``"word"`` are commhub's own."""
        return tuple(bucket for part in self._rounds for bucket in part.buckets)

    @property
    def waits(self) -> tuple[Interval, ...]:
        """When the driver waited for collectives with nothing else to do."""
        return tuple(interval for part in self._rounds for interval in part.waits)

    @property
    def blocked(self) -> tuple[Interval, ...]:
        """When training stood still for communication: for the buckets, and for the word that all ranks are done."""
        return tuple(interval for part in self._rounds for interval in part.blocked)

    def add(self, part: Round) -> None:
        """What was carried out for it."""
        self._rounds.append(part)
        self.ended = time.monotonic()


class Timeline:
    """The last steps of a registration, whichever hooks ran."""

    def __init__(self) -> None:
        self._steps: deque[StepRecord] = deque(maxlen=KEPT)

    @property
    def steps(self) -> tuple[StepRecord, ...]:
        """The steps, the oldest first."""
        return tuple(self._steps)

    def begin(self, step: int) -> None:
        """What follows belongs to this step."""
        now = time.monotonic()
        self._steps.append(StepRecord(step, now, now))

    def add(self, part: Round) -> None:
        """What was carried out since the last time; before the first step it belongs to none."""
        if self._steps and part.buckets:
            self._steps[-1].add(part)


class Recorder:
    """Records the round under way. A driver's thread writes, training reads when the round is over.

    Args:
        hook: the hook's name.
        enqueues: whether the driver enqueues on a device, and does not know when the work is done.
    """

    def __init__(self, hook: str = "", *, enqueues: bool = False) -> None:
        self.hook, self._enqueues = hook, enqueues
        self._round = self._before = Round()
        self._blocked_since: float | None = None
        self._waits_on = False

    def open(self, bucket: Bucket, purpose: Purpose) -> BucketRecord:
        """The record of a bucket that is ready."""
        record = BucketRecord(self.hook, bucket.index, purpose, time.monotonic(), self._enqueues, bucket.spans)
        if _ranges.is_on():
            before = (
                len(one.stages) for one in self._before.buckets if (one.purpose, one.index) == (purpose, bucket.index)
            )
            record.stages_before = next(before, 1)
        self._round.buckets.append(record)
        return record

    def waited(self, start: float, end: float) -> None:
        """The driver did nothing but wait; it goes on with that unless it ``works`` first."""
        waits = self._round.waits
        if self._waits_on and waits:
            waits[-1] = waits[-1][0], end
        else:
            waits.append((start, end))
        self._waits_on = True

    def works(self) -> None:
        """The driver has something to do."""
        self._waits_on = False

    def block(self) -> None:
        """Training stands still from now on."""
        self._blocked_since = time.monotonic()

    def unblock(self) -> None:
        """Training goes on."""
        since, self._blocked_since = self._blocked_since, None
        if since is not None:
            self._round.blocked.append((since, time.monotonic()))

    def take(self) -> Round:
        """The round that is over; another one begins."""
        done, self._round, self._waits_on = self._round, Round(), False
        if any(bucket.purpose != "word" for bucket in done.buckets):
            self._before = done
        return done


def encoded(jobs: Sequence[Job], start: float, end: float) -> StageRecord:
    """The record of a stage whose collectives are ready."""
    if len(jobs) == 1:
        job = jobs[0]
        return StageRecord((job.kind.__name__,), job.payload.nbytes, job.sent_bytes, (start, end))
    kinds = tuple(job.kind.__name__ for job in jobs)
    return StageRecord(kinds, sum(j.payload.nbytes for j in jobs), sum(j.sent_bytes for j in jobs), (start, end))
