"""Optimizers that step in backward: one of a module by itself, or commhub's ``optimizer_overlap`` of a DDP model.

Nobody registers a hook then: the script names parameters, and a DDP model that holds them may come later. The model's
first forward finds them.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.nn.parallel import DistributedDataParallel

import commhub

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from torch import Tensor, nn

_HELD = "_commhub_in_backward"
"""The attribute of a parameter that holds its optimizers. PyTorch's own would make DDP take the model's one hook."""
_unclaimed: weakref.WeakKeyDictionary[torch.optim.Optimizer, list[Any]] = weakref.WeakKeyDictionary()
"""By optimizer: the handles on its parameters, as long as no DDP model steps it."""
_watching: list[Any] = []
"""The handle on all modules' forward, while there is an optimizer that a DDP model may claim."""


def _apply_optimizer_in_backward(
    optimizer_class: type[torch.optim.Optimizer],
    params: Iterable[nn.Parameter],
    optimizer_kwargs: Mapping[str, Any],
    register_hook: bool = True,
) -> None:
    """Have these parameters stepped in backward, by an optimizer of their own, and their gradients set to ``None``.

    In a DDP model that happens once gradients are averaged, by commhub's ``optimizer_overlap``, which its first forward
    registers on every rank. One optimizer serves all parameters of a call.

    Args:
        optimizer_class: made with the parameters and ``optimizer_kwargs``.
        params: the parameters, before or after a DDP model wraps them, and before its first forward.
        optimizer_kwargs: for the optimizer.
        register_hook: step parameters that no DDP model holds. Otherwise something else does that.
    """
    parameters = list(params)
    if not parameters:
        return
    optimizer = optimizer_class(parameters, **optimizer_kwargs)
    handles = []
    for parameter in parameters:
        setattr(parameter, _HELD, Held([*_optimizers_of(parameter), optimizer]))
        if register_hook:
            handles.append(parameter.register_post_accumulate_grad_hook(_step_alone(optimizer)))
    _unclaimed[optimizer] = handles
    if not _watching:
        _watching.append(register_module_forward_pre_hook(_claim))


def _get_in_backward_optimizers(module: nn.Module) -> list[torch.optim.Optimizer]:
    """The optimizers of a module's parameters that step in backward, to save and load them; each once."""
    return list(dict.fromkeys(one for p in module.parameters() for one in _optimizers_of(p)))


class Held(list[torch.optim.Optimizer]):
    """A parameter's optimizers, in the order in which they were applied. Whoever saves the parameter saves none."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (type(None), ())


def _optimizers_of(parameter: Tensor) -> list[torch.optim.Optimizer]:
    return getattr(parameter, _HELD, None) or []


def _step_alone(optimizer: torch.optim.Optimizer) -> Any:
    """What is called when a parameter has its gradient. It holds nothing, since no garbage collector looks in there."""
    held = weakref.ref(optimizer)

    def step(parameter: Tensor) -> None:
        mine = held()
        if mine is not None:
            mine.step()  # of this parameter alone, as the others have no gradient now
            if mine is _optimizers_of(parameter)[-1]:
                parameter.grad = None

    return step


def _claim(module: nn.Module, _inputs: object) -> None:
    """Before a module's forward: if it is a DDP model that holds parameters of ours, register the hook on it."""
    if isinstance(module, DistributedDataParallel):
        held = {one for p in module._module_parameters for one in _optimizers_of(p)}
        mine = [one for one in _unclaimed if one in held]
        if mine:
            commhub.register(module, "optimizer_overlap", step="auto", optimizer=mine)
        for optimizer in mine:
            for handle in _unclaimed.pop(optimizer):
                handle.remove()
    if not _unclaimed and _watching:
        _watching.pop().remove()
