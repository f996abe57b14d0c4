"""In place of the reduce-scatter of a model that FSDP2 shards: four shards, and virtual ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from ._check import rule
from ._material import assert_mean, by_name, drawn, promised_error, simulate
from ._shards import RANKS, WIDE, build, fails_everywhere, goes_on, require_scattering

if TYPE_CHECKING:
    from torch import Tensor

    from ._subject import Subject


def _rows(whole: Tensor, rank: int, p: int) -> Tensor:
    parts = whole.chunk(p)
    return parts[rank] if rank < len(parts) else whole[:0]


@rule("simulated")
def scatters_means(subject: Subject) -> None:
    """A reduce_scatter of its leaves each rank the mean of its rows, in any buckets, as near as it promises."""
    require_scattering(subject)
    bound = promised_error(subject, torch.float32)
    for p in (1, 2, 3, 5):
        found = simulate(subject, lambda rank, step: drawn(rank, step, WIDE), p, buckets=p, sharded=True)
        for rank in range(p):
            for name, gradient in by_name(found, rank, WIDE).items():
                own = [_rows(drawn(other, 0, WIDE)[name], rank, p) for other in range(p)]
                assert_mean(gradient, own, bound, f"{p} ranks, rank {rank}: {name}")


@rule("sharded")
def scattered_mean(subject: Subject) -> None:
    """In place of FSDP's reduce-scatter it leaves the mean of each rank's shards, as near as it promises."""
    require_scattering(subject)
    bound, sharded = promised_error(subject, torch.float32), build(subject, inside=True)
    found = sharded.give(drawn(dist.get_rank(), 0, WIDE))
    for name in WIDE:
        own = [sharded.shard(drawn(rank, 0, WIDE)[name]) for rank in range(RANKS)]
        assert_mean(found[name], own, bound, name)
    assert sharded.registration.step == sharded.registration.stats.steps == 1


@rule("sharded", after=("scattered_mean",))
def scattered_resumes(subject: Subject) -> None:
    """In place of the reduce-scatter, too, a run goes on from its state bit by bit."""
    goes_on(subject, inside=True)


@rule("sharded", after=("scattered_mean",))
def scattered_failing_rank(subject: Subject) -> None:
    """When it fails on one rank in place of the reduce-scatter, all raise, and FSDP goes on after a swap."""
    fails_everywhere(subject, inside=True)
