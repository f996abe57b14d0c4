"""The collectives as plain tensor operations, for ranks that share a process. Sums are in rank order."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from commhub._errors import HookError
from commhub.protocol._collectives import AllGather, AllReduce, AllToAll, Broadcast, Collective, ReduceScatter

from ._failure import own_error
from ._job import Job, sum_shares, way

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ._task import Task


def check(label: str, tasks: list[Task]) -> None:
    """Look whether all ranks ask for the same, and for what can be carried out.

    Args:
        label: the hook's name, distribution and version, for errors.
        tasks: one per rank, in rank order.

    Raises:
        HookError: naming a rank and what it asked for.
    """

    def shown(task: Task) -> str:
        return "its end" if task.finished else " and ".join(map(_shown, task.jobs)) or "nothing"

    def differ(rank: int, other: int) -> HookError:
        told = f"asked for {shown(tasks[rank])} where rank {other} asked for {shown(tasks[other])}. Kinds, shapes and "
        told = f"rank {rank} {told}dtypes must not depend on a rank's own values."
        return own_error(label, tasks[rank].bucket, HookError(told))

    for rank, task in enumerate(tasks):
        if (task.finished, len(task.jobs)) != (tasks[0].finished, len(tasks[0].jobs)):
            raise differ(rank, 0)
    for stage in zip(*(task.jobs for task in tasks), strict=True):
        asked = [(j.kind, j.payload.numel(), j.payload.dtype, j.group, j.asked.manner) for j in stage]
        alike: set[int] = set()  # ranks that ask for what all of their group do
        for rank, job in enumerate(stage):
            if rank in alike:
                continue
            members = range(len(stage)) if job.group is None else job.group.ranks
            for other in members:
                if asked[other] != asked[rank]:
                    raise differ(other, rank)
            alike.update(members)
    for task in tasks:
        try:
            for job in task.jobs:
                way(WAYS, job.kind, "by the simulator")
        except HookError as error:
            raise own_error(label, task.bucket, error) from error


def _shown(job: Job) -> str:
    words = f"{job.payload.numel()} {job.payload.dtype} among {job.p} {job.asked.manner}".rstrip()
    return f"{job.kind.__name__}[{words}]"


def exchange(stage: Sequence[Job]) -> None:
    """Carry one collective out for all ranks: ``stage[r]`` is rank r's job, whose result ``taken`` gives."""
    done: set[int] = set()
    for rank, job in enumerate(stage):
        if rank in done:
            continue
        members = range(len(stage)) if job.group is None else job.group.ranks
        if rank not in members:
            raise HookError(
                f"rank {rank} asked for a collective in the subgroup {job.group}, to which it does not belong."
            )
        _carry_out([stage[r] for r in members])
        done.update(members)


def _carry_out(jobs: list[Job]) -> None:
    results = WAYS[jobs[0].kind](jobs)
    for job, result in zip(jobs, results, strict=True):
        job.raw = result


def taken(job: Job) -> Tensor:
    """A rank's result, 1-D, in memory of its own, and once: a thousand ranks' results are never there all at a time."""
    raw, job.raw = job.raw, None
    assert raw is not None
    return raw.clone(memory_format=torch.contiguous_format).view(-1)


def _all_reduce(jobs: list[Job]) -> list[Tensor]:
    total = jobs[0].payload.clone()
    for job in jobs[1:]:
        total += job.payload
    return [total] * len(jobs)


def _reduce_scatter(jobs: list[Job]) -> list[Tensor]:
    total = sum_shares([job.payload for job in jobs])  # an element's sum is the same, whoever has it
    return list(total.view(len(jobs), -1) if total.numel() else [total] * len(jobs))


def _all_gather(jobs: list[Job]) -> list[Tensor]:
    return [torch.cat([job.payload for job in jobs])] * len(jobs)


def _all_to_all(jobs: list[Job]) -> list[Tensor]:
    p, numel = len(jobs), jobs[0].payload.numel()
    sent = torch.stack([job.payload.view(p, numel // p) for job in jobs])
    return list(sent.unbind(1))


def _broadcast(jobs: list[Job]) -> list[Tensor]:
    src = cast("Broadcast", jobs[0].asked).src
    return [jobs[src].payload.clone()] * len(jobs)


WAYS: dict[type[Collective], Callable[[list[Job]], list[Tensor]]] = {
    AllReduce: _all_reduce,
    ReduceScatter: _reduce_scatter,
    AllGather: _all_gather,
    AllToAll: _all_to_all,
    Broadcast: _broadcast,
}
"""What comes of each kind: the group's jobs in rank order, to each one's result.

Results share no memory with payloads, but may with one another: ``taken`` gives a rank its own.
"""
