"""Which optimizers go with local steps: those that step on every rank all that the rank trains, and this model's."""

from __future__ import annotations

import itertools
import sys
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from commhub._errors import RegistrationError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from torch import Tensor, nn


def check_local(optimizers: Sequence[torch.optim.Optimizer], parameters: Iterable[Tensor]) -> None:
    """Raise RegistrationError if an optimizer is sharded or updates none of ``parameters``."""
    ours = {id(parameter) for parameter in parameters}
    for optimizer in optimizers:
        if is_sharded(optimizer):
            raise _refusal(optimizer)
        if not _updated(optimizer) & ours:
            raise RegistrationError(
                f"the {type(optimizer).__name__} that was given updates no parameter of this model. Give its own."
            )


def is_sharded(optimizer: torch.optim.Optimizer) -> bool:
    """Whether it steps some of its parameters on this rank, and has the others from other ranks.

    PyTorch's is told by its type. Others are told by what they hold: an optimizer in ``optim`` that has some of their
    parameters only. One that wraps a sharded one is sharded.
    """
    module: Any = sys.modules.get("torch.distributed.optim")  # importing it takes long; who has one has imported it
    if module is not None and isinstance(optimizer, getattr(module, "ZeroRedundancyOptimizer", ())):
        return True
    inside = [one for one in vars(optimizer).values() if isinstance(one, torch.optim.Optimizer)]
    if not inside:
        return False
    local = vars(optimizer).get("optim")
    return (local in inside and _updated(local) < _updated(optimizer)) or any(map(is_sharded, inside))


def watch_steps(module: nn.Module) -> Callable[[], None]:
    """Refuse every step that a sharded optimizer takes on the module's parameters; return what ends that.

    It looks at types and attributes alone. An optimizer that was not given is found in no other way.
    """
    number = next(_numbers)
    _watched[number] = module
    if not _handles:
        _handles.append(register_optimizer_step_pre_hook(torch.compiler.disable(_look)))

    def end() -> None:
        _watched.pop(number, None)
        while _handles and not _watched:
            _handles.pop().remove()

    return end


_numbers = itertools.count()
_watched: weakref.WeakValueDictionary[int, nn.Module] = weakref.WeakValueDictionary()
_handles: list[Any] = []
"""The one hook on all optimizers' steps. Within a step it is not removed: PyTorch is going through its hooks."""


def _look(optimizer: torch.optim.Optimizer, *_: object) -> None:
    if is_sharded(optimizer):
        updated = _updated(optimizer)
        if any(id(parameter) in updated for module in _watched.values() for parameter in module.parameters()):
            raise _refusal(optimizer)


def _updated(optimizer: torch.optim.Optimizer) -> set[int]:
    return {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}


def _refusal(optimizer: torch.optim.Optimizer) -> RegistrationError:
    return RegistrationError(
        f"{type(optimizer).__name__} steps on each rank only the parameters that this rank owns, and local steps leave "
        "each rank, or each host, gradients of its own: every parameter would be trained on its owner's batches alone. "
        "Use the optimizer inside it by itself, on all parameters."
    )
