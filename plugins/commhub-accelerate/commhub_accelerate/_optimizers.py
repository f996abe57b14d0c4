"""Which optimizers hold a model's parameters, as they are underneath what Accelerate puts around them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ._framework import require

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import nn


def unwrapped(optimizers: Iterable[Any]) -> tuple[Any, ...]:
    """The optimizers in the ``AcceleratedOptimizer`` objects, which have no step hooks of their own."""
    wrapper = require("accelerate").optimizer.AcceleratedOptimizer
    found: list[Any] = []
    for optimizer in optimizers:
        inner = optimizer
        while isinstance(inner, wrapper):
            inner = inner.optimizer
        if not any(inner is one for one in found):
            found.append(inner)
    return tuple(found)


def holding(optimizers: Iterable[Any], model: nn.Module) -> tuple[Any, ...]:
    """Those of the optimizers that hold a parameter of the model."""
    mine = {id(p) for p in model.parameters()}
    return tuple(optimizer for optimizer in optimizers if mine & _held(optimizer))


def cover(optimizers: Iterable[Any], model: nn.Module) -> bool:
    """Whether the optimizers together hold every parameter that the model trains."""
    held = {number for optimizer in optimizers for number in _held(optimizer)}
    return all(id(p) in held for p in model.parameters() if p.requires_grad)


def _held(optimizer: Any) -> set[int]:
    return {id(p) for group in optimizer.param_groups for p in group["params"]}
