"""Between the replicas of a model that FSDP2 shards: two replicas of two shards."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from commhub.testing._compare import assert_equal_across_ranks, bitwise_equal

from ._check import rule
from ._material import assert_mean, drawn, promised_error, require_agreement
from ._shards import RANKS, WIDE, build, fails_everywhere, goes_on

if TYPE_CHECKING:
    from torch import Tensor

    from ._shards import Sharded
    from ._subject import Subject


def _of_replicas(sharded: Sharded, step: int) -> dict[str, list[Tensor]]:
    """What each replica brings of this rank's shards: the mean over its own ranks."""
    every = [drawn(rank, step, WIDE) for rank in range(RANKS)]
    return {
        name: [sharded.shard((every[r][name] + every[r + 1][name]) / 2) for r in range(0, RANKS, 2)] for name in WIDE
    }


@rule("sharded")
def sharded_mean(subject: Subject) -> None:
    """Between replicas it leaves the mean of their shards, as near as it promises."""
    bound, sharded = promised_error(subject, torch.float32), build(subject)
    for step in range(2):
        found = sharded.give(drawn(dist.get_rank(), step, WIDE))
        if step and not subject.promises("exact"):
            break  # what it did not send in the first step is in the second
        for name, own in _of_replicas(sharded, step).items():
            assert_mean(found[name], own, bound, f"step {step}: {name}")


@rule("sharded")
def sharded_replicas_agree(subject: Subject) -> None:
    """Replicas have the same shards after it, bit by bit, and each unit counts as a bucket of a step."""
    require_agreement(subject)
    sharded = build(subject)
    for step in range(4):
        found = sharded.give(drawn(dist.get_rank(), step, WIDE))
        assert_equal_across_ranks(found, sharded.replicas)
    assert sharded.registration.step == sharded.registration.stats.steps == 4


@rule("sharded", after=("sharded_replicas_agree",))
def sharded_accumulation(subject: Subject) -> None:
    """Gradients of a backward that is not synchronised are averaged with the next one's, as if they came at once."""
    rank, sharded, twin = dist.get_rank(), build(subject), build(subject)
    for step in range(2):
        first, second = drawn(rank, 10 * step, WIDE), drawn(rank, 10 * step + 1, WIDE)
        apart = sharded.give(first, second)
        together = twin.give({name: first[name] + second[name] for name in first})
        for name, gradient in together.items():
            assert bitwise_equal(apart[name], gradient), f"step {step}: {name}"
        assert sharded.registration.step == step + 1


@rule("sharded", after=("sharded_replicas_agree",))
def sharded_resumes(subject: Subject) -> None:
    """A run on shards goes on from its state bit by bit."""
    goes_on(subject)


@rule("sharded", after=("sharded_replicas_agree",))
def sharded_failing_rank(subject: Subject) -> None:
    """When it fails on one rank all ranks of the mesh raise, other shards' too, and FSDP goes on after a swap."""
    fails_everywhere(subject)


@rule("sharded", kinds=("averager",))
def sharded_averages(subject: Subject) -> None:
    """Between replicas it averages shards after the optimizer's steps, in place, and replicas end with the same."""
    sharded = build(subject)
    shards = {name: p.detach().to_local() for name, p in sharded.model.named_parameters()}
    kept = {name: (part.data_ptr(), part.stride()) for name, part in shards.items()}
    for step in range(6):
        sharded.give(drawn(dist.get_rank(), step, WIDE))
        sharded.optimizer.step()
    sharded.registration.remove()
    for name, p in sharded.model.named_parameters():
        part = p.detach().to_local()
        assert (part.data_ptr(), part.stride()) == kept[name], f"the memory of {name} was replaced"
        assert part.isfinite().all(), f"{name} is not finite"
        shards[name] = part
    assert_equal_across_ranks(shards, sharded.replicas)
