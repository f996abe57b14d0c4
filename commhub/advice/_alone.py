"""A hook at work on one rank whose peers are imagined: what it asks for, and how long it computes.

Which collectives a hook asks for, and of which sizes, depends on the layout and on its options alone; so one rank finds
that out for any number of them. Its peers' answers are made of what it sends itself.
"""

from __future__ import annotations

import statistics
import time
from functools import partial
from typing import TYPE_CHECKING

import attrs

from commhub.drivers._failure import own_error
from commhub.drivers._job import Scratch
from commhub.drivers._stats import Meter
from commhub.drivers._task import Task
from commhub.drivers._virtual_buckets import Whole
from commhub.protocol._collectives import AllGather, AllToAll, ReduceScatter, Subgroup
from commhub.protocol._setup import Setup
from commhub.protocol._state import State

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch
    from torch import Tensor

    from commhub.drivers._job import Job
    from commhub.protocol._collectives import Collective
    from commhub.protocol._hook import Hook


@attrs.frozen(kw_only=True)
class Asked:
    """One collective.

    Attributes:
        kind: which.
        payload_bytes: what it carries, as it travels.
        sent_bytes: what this rank sends for that, to anybody.
        ranks: among whom; ``None`` for all.
    """

    kind: type[Collective]
    payload_bytes: int
    sent_bytes: float
    ranks: tuple[int, ...] | None


@attrs.frozen(kw_only=True)
class StageCost:
    """What a hook does up to one ``yield``: seconds, and what it asks for there."""

    seconds: float
    asked: tuple[Asked, ...]


@attrs.frozen(kw_only=True)
class BucketCost:
    """What a hook does with one bucket, in the steady state.

    Attributes:
        stages: in order.
        decode: seconds of work after the last collective.
    """

    stages: tuple[StageCost, ...]
    decode: float

    @property
    def sent_bytes(self) -> float:
        """What a rank sends."""
        return sum(one.sent_bytes for stage in self.stages for one in stage.asked)


def work_alone(
    hook: Hook,
    label: str,
    buckets: Sequence[Sequence[Tensor]],
    *,
    hosts: Sequence[int],
    rank: int = 0,
    wire: torch.dtype | None = None,
    steps: int = 5,
    warm_up: int = 2,
) -> tuple[BucketCost, ...]:
    """What a hook does with each of a model's buckets, medians over some steps.

    Args:
        hook: not prepared yet. Averagers have their own timetable, and are not meant here.
        label: its name, for errors.
        buckets: the gradients of each bucket, in the order of arrival; they are not changed.
        hosts: per rank, the number of its host: as many ranks are imagined.
        rank: which of them this one is.
        wire: the registration's wire dtype.
        steps: how many are measured.
        warm_up: how many come before.

    Raises:
        HookError: what the hook did wrong.
    """
    desk = _Desk(hook, label, buckets, hosts, rank, wire)
    for _ in range(warm_up):
        desk.step()
    seen = [desk.step() for _ in range(steps)]
    return tuple(_median(costs) for costs in zip(*seen, strict=True))


def _median(costs: Sequence[BucketCost]) -> BucketCost:
    stages = zip(*(cost.stages for cost in costs), strict=True)
    return BucketCost(
        stages=tuple(
            StageCost(seconds=statistics.median(one.seconds for one in same), asked=same[-1].asked) for same in stages
        ),
        decode=statistics.median(cost.decode for cost in costs),
    )


class _Desk:
    """Where a hook works by itself, step after step."""

    def __init__(
        self,
        hook: Hook,
        label: str,
        buckets: Sequence[Sequence[Tensor]],
        hosts: Sequence[int],
        rank: int,
        wire: torch.dtype | None,
    ) -> None:
        self._hook, self._label, self._rank, self._wire = hook, label, rank, wire
        self._p = len(hosts)
        self._scratch, self._step = Scratch(), 0
        self._groups: set[Subgroup] = set()
        self._partitions = 0
        self._after: list[Callable[[int], None]] = []
        counted = iter(range(sum(map(len, buckets))))
        self._buckets = [([str(next(counted)) for _ in tensors], tensors) for tensors in buckets]
        names = tuple(name for own, _ in self._buckets for name in own)
        tensors = [tensor for own in buckets for tensor in own]
        self._state = State(names)
        prepare = getattr(hook, "prepare", None)
        if prepare is not None:
            prepare(
                Setup(
                    names=names,
                    shapes=tuple(tuple(each.shape) for each in tensors),
                    dtypes=tuple(each.dtype for each in tensors),
                    strides=tuple(each.stride() for each in tensors),
                    device=tensors[0].device,
                    rank=rank,
                    world_size=self._p,
                    hosts=tuple(hosts),
                    wire=wire,
                    state=self._state,
                    connect=self._connect,
                    after_step=self._after.append,
                )
            )

    def _connect(self, groups: Sequence[Sequence[int]]) -> tuple[Subgroup, ...]:
        self._partitions += 1
        made = tuple(Subgroup(tuple(ranks), self._partitions) for ranks in groups)
        self._groups.update(group for group in made if self._rank in group.ranks)
        return made

    def step(self) -> tuple[BucketCost, ...]:
        """One step of all buckets, one after another."""
        self._state.begin()
        costs = tuple(self._bucket(index, *bucket) for index, bucket in enumerate(self._buckets))
        self._state.commit(finite=True)
        for function in self._after:
            function(self._step)
        self._step += 1
        return costs

    def _bucket(self, index: int, names: Sequence[str], tensors: Sequence[Tensor]) -> BucketCost:
        bucket = Whole().bucket(
            names,
            tensors,
            index=index,
            step=self._step,
            divisor=self._p,
            rank=self._rank,
            world_size=self._p,
            group=None,
        )
        task = Task(
            self._hook,
            bucket,
            world=self._p,
            wire=self._wire,
            scratch=self._scratch,
            meter=Meter(),
            groups=self._groups,
            watch=not self._state.is_empty(),
        )
        stages = []
        try:
            seconds = _timed(task.start)
            while not task.finished:
                stages.append(StageCost(seconds=seconds, asked=tuple(map(_asked, task.jobs))))
                answers = [_answer(job) for job in task.jobs]
                seconds = _timed(partial(task.resume, answers))
        except Exception as error:
            raise own_error(self._label, bucket, error) from error
        return BucketCost(stages=tuple(stages), decode=seconds)


def _timed(action: Callable[[], None]) -> float:
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def _asked(job: Job) -> Asked:
    ranks = None if job.group is None else job.group.ranks
    return Asked(kind=job.kind, payload_bytes=job.payload.nbytes, sent_bytes=job.sent_bytes, ranks=ranks)


def _answer(job: Job) -> Tensor:
    """What might have come back: 1-D, as it travels."""
    if job.kind is AllGather:
        return job.payload.repeat(job.p)
    if job.kind is ReduceScatter:
        return job.payload[: job.payload.numel() // job.p].clone()
    if job.kind is AllToAll:
        return job.payload.clone()
    return job.payload
