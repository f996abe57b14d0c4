"""Gradients, models and comparisons that several checks use."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ._check import NotApplicableError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch.nn.parallel import DistributedDataParallel

    from commhub import Registration
    from commhub.drivers._simulator import Simulation

    from ._subject import Subject

SHAPES: Mapping[str, tuple[int, ...]] = {
    "tall": (64, 48),
    "conv": (16, 8, 3, 3),
    "vector": (33,),
    "wide": (40, 72),
    "scalar": (),
    "square": (32, 32),
}
"""Large enough for a hook's default options to compress the matrices."""

ROUNDING = {
    torch.float32: 1e-6,
    torch.float64: 1e-14,
    torch.complex64: 1e-6,
    torch.float16: 2e-3,
    torch.bfloat16: 2e-2,
}
"""What a dtype's own rounding leaves of a mean of a few ranks."""

ONE, MANY = 25.0, 1e-6  # bucket_cap_mb: everything in one bucket; one for each parameter, from the second step on


def drawn(rank: int, step: int, shapes: Mapping[str, tuple[int, ...]] = SHAPES) -> dict[str, Tensor]:
    """Normal gradients by name, different on each rank and in each step."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def simulate(
    subject: Subject,
    gradients: Callable[[int, int], Mapping[str, Tensor]],
    p: int,
    *,
    steps: int = 1,
    buckets: int = 1,
    **options: Any,
) -> Simulation:
    """Drive the subject on p virtual ranks with gradients by name."""
    import commhub

    def listed(rank: int, step: int) -> Sequence[Tensor]:
        return list(gradients(rank, step).values())

    return commhub.simulate(subject.hook, listed, ranks=p, steps=steps, buckets=buckets, **options)


def by_name(simulation: Simulation, rank: int, shapes: Mapping[str, Any] = SHAPES) -> dict[str, Tensor]:
    """One rank's results."""
    return dict(zip(shapes, simulation.gradients[rank], strict=True))


def promised_error(subject: Subject, dtype: torch.dtype) -> float:
    """The relative error that one step may have.

    Raises:
        NotApplicableError: if the spec promises none.
    """
    if subject.promises("exact"):
        return ROUNDING[dtype]
    tolerance = subject.promises("tolerance")
    if tolerance is None:
        raise NotApplicableError("it promises no bound on the error of one step")
    return max(float(tolerance), ROUNDING[dtype])


def require_agreement(subject: Subject) -> None:
    """See that ranks are not declared to differ.

    Raises:
        NotApplicableError: if they are.
    """
    if subject.promises("agrees") is False:
        raise NotApplicableError("it declares that ranks do not agree")


def assert_mean(found: Tensor, own: Sequence[Tensor], bound: float, where: str, divisor: int | None = None) -> None:
    """Compare with the mean in double precision, relative to the ranks' own: what nearly cancels has no digits left."""
    wide = torch.complex128 if found.is_complex() else torch.float64
    total = torch.stack([g.to(wide) for g in own])
    mean = total.sum(0) / (divisor or len(own))
    size = float(total.abs().mean(0).norm())
    assert found.isfinite().all(), f"{where} is not finite"
    error = float((found.to(wide) - mean).norm())
    assert error <= bound * size, f"{where} is off by {error:.3g} of {size:.3g}; {bound:.3g} of that is promised"


class Given(nn.Module):
    """Parameters of several shapes, whose gradients are those that ``forward`` is given by name."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]] = SHAPES) -> None:
        super().__init__()
        self.weights = nn.ParameterDict({name: torch.zeros(shape) for name, shape in shapes.items()})

    def forward(self, gradients: Mapping[str, Tensor]) -> Tensor:
        """A scalar whose gradient they are."""
        total: Tensor = torch.stack([(self.weights[name] * g).sum() for name, g in gradients.items()]).sum()
        return total


def optimizer_for(subject: Subject | None, parameters: Any, lr: float, group: Any = None) -> torch.optim.Optimizer:
    """An optimizer of the kind that the spec asks for, else SGD."""
    if subject is not None and "zero_redundancy_optimizer" in subject.spec.needs:
        from torch.distributed.optim import ZeroRedundancyOptimizer

        return ZeroRedundancyOptimizer(parameters, torch.optim.SGD, process_group=group, lr=lr)
    return torch.optim.SGD(parameters, lr=lr)


_optimizers: weakref.WeakKeyDictionary[nn.Module, torch.optim.Optimizer] = weakref.WeakKeyDictionary()


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer that ``build`` made."""
    return _optimizers[model]


def build(
    subject: Subject | None,
    cap: float = ONE,
    module: nn.Module | None = None,
    *,
    lr: float = 0.0,
    group: Any = None,
    scaler: Any = None,
    **ddp: Any,
) -> tuple[DistributedDataParallel, Registration]:
    """A DDP model with the subject registered, and its registration; without a subject, with the plain mean.

    The model has an optimizer, which ``give`` steps; with ``lr=0`` it moves nothing.
    """
    from torch.nn.parallel import DistributedDataParallel

    import commhub

    model = DistributedDataParallel(
        Given() if module is None else module, process_group=group, bucket_cap_mb=cap, **ddp
    )
    hook: Any = Plain() if subject is None else subject.hook
    optimizer = _optimizers[model] = optimizer_for(subject, model.parameters(), lr, group)
    needed = subject is not None and any("optimizer" in need for need in subject.spec.needs)
    return model, commhub.register(model, hook, optimizer=optimizer if needed else None, scaler=scaler, timeout=30)


class Plain:
    """The mean, to compare with."""

    def reduce(self, bucket: Any) -> Any:
        """One all-reduce."""
        from commhub import AllReduce

        bucket.flat.copy_((yield AllReduce(bucket.flat)))


def give(model: DistributedDataParallel, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """One backward with these gradients on this rank; copies of what came of them, by name."""
    model.zero_grad()
    model(gradients).backward()
    found = results(model)
    optimizer_of(model).step()
    return found


def results(model: DistributedDataParallel) -> dict[str, Tensor]:
    """Copies of the gradients that there are, by name."""
    weights = dict(model.module.named_parameters())
    return {name.removeprefix("weights."): w.grad.clone() for name, w in weights.items() if w.grad is not None}


def state_of(registration: Registration) -> dict[str, Tensor]:
    """All that this rank remembers, as {where: tensor}."""
    saved = registration.state_dict()
    scopes = {"shared": saved["shared"], **saved["local"]}
    return {
        f"{scope}: {key} of {name}": tensor
        for scope, tables in scopes.items()
        for name, table in tables.items()
        for key, tensor in table.items()
    }


def couples(subject: Subject) -> bool:
    """Whether a parameter's result depends on what shares its bucket."""
    apart = simulate(subject, drawn, 2, buckets=len(SHAPES))
    together = simulate(subject, drawn, 2, buckets=1)
    pairs = zip(apart.gradients[0], together.gradients[0], strict=True)
    return any((a - b).norm() > 1e-4 * b.norm() for a, b in pairs)
