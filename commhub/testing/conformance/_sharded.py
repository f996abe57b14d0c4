"""Between the replicas of a model that FSDP2 shards: two replicas of two shards."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import attrs
import torch
import torch.distributed as dist

from commhub.testing._compare import assert_equal_across_ranks, bitwise_equal

from ._check import NotApplicableError, rule
from ._faulty import faulty
from ._material import SHAPES, Given, assert_mean, drawn, promised_error, require_agreement, state_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor
    from torch.distributed.device_mesh import DeviceMesh

    from commhub import Registration

    from ._subject import Subject

RANKS = 4
"""Two replicas of two shards."""
_WIDE = {name: shape for name, shape in SHAPES.items() if shape}  # FSDP takes no scalars


@attrs.frozen
class _Sharded:
    """A model with the subject between its replicas, on this rank."""

    mesh: DeviceMesh
    model: Any
    optimizer: torch.optim.Optimizer
    registration: Registration

    def give(self, *gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A backward with each of these gradients, the last one synchronised; what came of this rank's shards."""
        self.model.zero_grad()
        for number, own in enumerate(gradients):
            self.model.set_requires_gradient_sync(number == len(gradients) - 1)
            self.model(own).backward()
        parameters = self.model.named_parameters()
        return {name.removeprefix("weights."): p.grad.to_local().clone() for name, p in parameters}

    def shard(self, whole: Tensor) -> Tensor:
        """This rank's part of a parameter's gradient."""
        parts = whole.chunk(self.mesh["shard"].size())
        place = self.mesh["shard"].get_local_rank()
        return parts[place] if place < len(parts) else whole[:0]


def _build(subject: Subject) -> _Sharded:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    import commhub

    hook: Any = subject.hook
    if getattr(commhub.create(hook), "steps_optimizer", False):
        raise NotApplicableError("it steps the optimizer in backward, which reads its gradients elsewhere under FSDP")
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    model: Any = fully_shard(Given(_WIDE), mesh=mesh["shard"])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    options: dict[str, Any] = {"process_group": mesh["replicate"], "optimizer": optimizer, "timeout": 30}
    return _Sharded(mesh, model, optimizer, commhub.register(model, hook, **options))


def _of_replicas(sharded: _Sharded, step: int) -> dict[str, list[Tensor]]:
    """What each replica brings of this rank's shards: the mean over its own ranks."""
    every = [drawn(rank, step, _WIDE) for rank in range(RANKS)]
    return {
        name: [sharded.shard((every[r][name] + every[r + 1][name]) / 2) for r in range(0, RANKS, 2)] for name in _WIDE
    }


@rule("sharded")
def sharded_mean(subject: Subject) -> None:
    """Between replicas it leaves the mean of their shards, as near as it promises."""
    bound, sharded = promised_error(subject, torch.float32), _build(subject)
    for step in range(2):
        found = sharded.give(drawn(dist.get_rank(), step, _WIDE))
        if step and not subject.promises("exact"):
            break  # what it did not send in the first step is in the second
        for name, own in _of_replicas(sharded, step).items():
            assert_mean(found[name], own, bound, f"step {step}: {name}")


@rule("sharded")
def sharded_replicas_agree(subject: Subject) -> None:
    """Replicas have the same shards after it, bit by bit, and each unit counts as a bucket of a step."""
    require_agreement(subject)
    sharded = _build(subject)
    for step in range(4):
        found = sharded.give(drawn(dist.get_rank(), step, _WIDE))
        assert_equal_across_ranks(found, sharded.mesh["replicate"].get_group())
    assert sharded.registration.step == sharded.registration.stats.steps == 4


@rule("sharded", after=("sharded_replicas_agree",))
def sharded_accumulation(subject: Subject) -> None:
    """Gradients of a backward that is not synchronised are averaged with the next one's, as if they came at once."""
    rank, sharded, twin = dist.get_rank(), _build(subject), _build(subject)
    for step in range(2):
        first, second = drawn(rank, 10 * step, _WIDE), drawn(rank, 10 * step + 1, _WIDE)
        apart = sharded.give(first, second)
        together = twin.give({name: first[name] + second[name] for name in first})
        for name, gradient in together.items():
            assert bitwise_equal(apart[name], gradient), f"step {step}: {name}"
        assert sharded.registration.step == step + 1


@rule("sharded", after=("sharded_replicas_agree",))
def sharded_resumes(subject: Subject) -> None:
    """A run on shards goes on from its state bit by bit."""
    rank, sharded = dist.get_rank(), _build(subject)
    for step in range(3):
        sharded.give(drawn(rank, step, _WIDE))
    file = io.BytesIO()
    torch.save(sharded.registration.state_dict(), file)
    kept, expected = state_of(sharded.registration), sharded.give(drawn(rank, 3, _WIDE))
    file.seek(0)
    again = _build(subject)
    again.give(drawn(rank, 90, _WIDE))
    again.registration.load_state_dict(torch.load(file, weights_only=True))
    assert again.registration.step == 3
    for key, tensor in state_of(again.registration).items():
        assert bitwise_equal(tensor, kept[key]), f"{key} was not restored bit by bit"
    for name, gradient in again.give(drawn(rank, 3, _WIDE)).items():
        assert bitwise_equal(gradient, expected[name]), f"the step after loading differs in {name}"


@rule("sharded", after=("sharded_replicas_agree",))
def sharded_failing_rank(subject: Subject) -> None:
    """When it fails on one rank all ranks of the mesh raise, other shards' too, and FSDP goes on after a swap."""
    import commhub

    rank, sharded = dist.get_rank(), _build(subject)
    kind: Any = type(sharded.registration.hook)
    told: commhub.HookError | None = None
    with patch.object(kind, "reduce", faulty(kind.reduce, 1) if rank == RANKS - 1 else kind.reduce):
        sharded.give(drawn(rank, 0, _WIDE))
        try:
            sharded.give(drawn(rank, 1, _WIDE))
        except commhub.HookError as error:
            told = error
    if told is not None:
        assert "ZeroDivisionError: planned" in str(told), str(told)
        assert sharded.registration.step == 1, f"the failed step counts on rank {rank}"
    else:  # who waits for nobody learns of nobody's failure, in another replica
        waits = sharded.registration.stats.last.sent_bytes or rank >= RANKS // 2
        assert not waits, f"no error on rank {rank}"
    hook: Any = subject.hook
    sharded.registration.swap(hook)
    found = sharded.give(drawn(rank, 2, _WIDE))
    assert all(gradient.isfinite().all() for gradient in found.values()), "after a swap to another of its kind"
    assert sharded.registration.step in (2, 3)  # as many as have ended on any rank


@rule("sharded", kinds=("averager",))
def sharded_averages(subject: Subject) -> None:
    """Between replicas it averages shards after the optimizer's steps, in place, and replicas end with the same."""
    sharded = _build(subject)
    shards = {name: p.detach().to_local() for name, p in sharded.model.named_parameters()}
    kept = {name: (part.data_ptr(), part.stride()) for name, part in shards.items()}
    for step in range(6):
        sharded.give(drawn(dist.get_rank(), step, _WIDE))
        sharded.optimizer.step()
    sharded.registration.remove()
    for name, p in sharded.model.named_parameters():
        part = p.detach().to_local()
        assert (part.data_ptr(), part.stride()) == kept[name], f"the memory of {name} was replaced"
        assert part.isfinite().all(), f"{name} is not finite"
        shards[name] = part
    assert_equal_across_ranks(shards, sharded.mesh["replicate"].get_group())
