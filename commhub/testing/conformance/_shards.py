"""Models that FSDP2 shards, with a hook between their replicas or in place of the reduce-scatter."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import attrs
import torch
import torch.distributed as dist

from commhub.protocol._hook import can_scatter
from commhub.testing._compare import bitwise_equal

from ._check import NotApplicableError
from ._faulty import faulty
from ._material import SHAPES, Given, drawn, state_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from commhub import Registration

    from ._subject import Subject

RANKS = 4
"""Two replicas of two shards, or four shards."""
WIDE = {name: shape for name, shape in SHAPES.items() if shape}  # FSDP takes no scalars


@attrs.frozen
class Sharded:
    """A model with the subject, on this rank.

    Attributes:
        replicas: the ranks that keep the same shards as this one.
        shards: how many there are.
        place: which of them this rank keeps.
    """

    model: Any
    optimizer: torch.optim.Optimizer
    registration: Registration
    replicas: Any
    shards: int
    place: int

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
        parts = whole.chunk(self.shards)
        return parts[self.place] if self.place < len(parts) else whole[:0]


def require_scattering(subject: Subject) -> None:
    """See that it has a ``reduce_scatter``.

    Raises:
        NotApplicableError: if not.
    """
    if not can_scatter(subject.recipe.make()):
        raise NotApplicableError("it has no reduce_scatter, and works between replicas of shards alone")


def build(subject: Subject, *, inside: bool = False) -> Sharded:
    """The subject between two replicas of two shards; or inside four shards.

    Raises:
        NotApplicableError: where it does not work.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    import commhub

    hook: Any = subject.hook
    if getattr(subject.recipe.make(), "steps_optimizer", False):
        raise NotApplicableError("it steps the optimizer in backward, which reads its gradients elsewhere under FSDP")
    if inside:
        require_scattering(subject)
    sizes = (1, RANKS) if inside else (2, 2)
    mesh = init_device_mesh("cpu", sizes, mesh_dim_names=("replicate", "shard"))
    model: Any = fully_shard(Given(WIDE), mesh=mesh["shard"])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    group = mesh["shard" if inside else "replicate"]
    registration = commhub.register(model, hook, process_group=group, optimizer=optimizer, timeout=30)
    replicas, shards = mesh["replicate"].get_group(), mesh["shard"]
    return Sharded(model, optimizer, registration, replicas, shards.size(), shards.get_local_rank())


def goes_on(subject: Subject, *, inside: bool = False) -> None:
    """See that a run goes on from its state bit by bit."""
    rank, sharded = dist.get_rank(), build(subject, inside=inside)
    for step in range(3):
        sharded.give(drawn(rank, step, WIDE))
    file = io.BytesIO()
    torch.save(sharded.registration.state_dict(), file)
    kept, expected = state_of(sharded.registration), sharded.give(drawn(rank, 3, WIDE))
    file.seek(0)
    again = build(subject, inside=inside)
    again.give(drawn(rank, 90, WIDE))
    again.registration.load_state_dict(torch.load(file, weights_only=True))
    assert again.registration.step == 3
    for key, tensor in state_of(again.registration).items():
        assert bitwise_equal(tensor, kept[key]), f"{key} was not restored bit by bit"
    for name, gradient in again.give(drawn(rank, 3, WIDE)).items():
        assert bitwise_equal(gradient, expected[name]), f"the step after loading differs in {name}"


def fails_everywhere(subject: Subject, *, inside: bool = False) -> None:
    """See that all ranks raise where it fails on one, and that FSDP goes on after a swap."""
    import commhub

    rank, sharded = dist.get_rank(), build(subject, inside=inside)
    kind: Any = type(sharded.registration.hook)
    method = "reduce_scatter" if inside else "reduce"
    whole = getattr(kind, method)
    told: commhub.HookError | None = None
    with patch.object(kind, method, faulty(whole, 1) if rank == RANKS - 1 else whole):
        sharded.give(drawn(rank, 0, WIDE))
        try:
            sharded.give(drawn(rank, 1, WIDE))
        except commhub.HookError as error:
            told = error
    if told is not None:
        assert "ZeroDivisionError: planned" in str(told), str(told)
        assert sharded.registration.step == 1, f"the failed step counts on rank {rank}"
    else:  # who waits for nobody learns of nobody's failure, in another replica
        waits = sharded.registration.stats.last.sent_bytes or rank >= RANKS // 2
        assert not waits, f"no error on rank {rank}"
    unheard = torch.tensor(float(told is None))
    dist.all_reduce(unheard)
    hook: Any = subject.hook
    sharded.registration.swap(hook)
    found = sharded.give(drawn(rank, 2, WIDE))
    assert all(gradient.isfinite().all() for gradient in found.values()), "after a swap to another of its kind"
    assert sharded.registration.step == (3 if unheard else 2)  # as many as have ended on any rank
