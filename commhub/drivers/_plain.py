"""The collectives as plain tensor operations, for ranks that share a process. Sums are in rank order."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from commhub._errors import HookError
from commhub.protocol._collectives import AllGather, AllReduce, AllToAll, Broadcast, ReduceScatter

from ._job import sum_shares

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ._job import Job


def exchange(stage: Sequence[Job]) -> None:
    """Carry one collective out for all ranks: ``stage[r]`` is rank r's job, whose ``raw`` gets its result."""
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
    kind, payloads = jobs[0].kind, [job.payload for job in jobs]
    if kind is AllReduce:
        total = payloads[0].clone()
        for payload in payloads[1:]:
            total += payload
        results = [total.clone() for _ in jobs]
    elif kind is Broadcast:
        results = [payloads[jobs[0].src].clone() for _ in jobs]
    elif kind is AllGather:
        results = [torch.cat(payloads) for _ in jobs]
    else:
        shares = [payload.chunk(len(jobs)) if payload.numel() else [payload] * len(jobs) for payload in payloads]
        if kind is AllToAll:
            results = [torch.cat([mine[place] for mine in shares]) for place in range(len(jobs))]
        else:
            assert kind is ReduceScatter
            results = [sum_shares([mine[place] for mine in shares]) for place in range(len(jobs))]
    for job, result in zip(jobs, results, strict=True):
        job.raw = result
