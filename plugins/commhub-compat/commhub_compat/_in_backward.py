"""Optimizers that step in backward: one of a module by itself, or commhub's ``optimizer_overlap`` of a DDP model.

Nobody registers a hook then: the script names parameters, and a DDP model that holds them may come later. The model's
first forward finds them.
"""

from __future__ import annotations

import weakref
from functools import partial
from typing import TYPE_CHECKING, Any

import attrs
import torch
from torch.distributed.optim.apply_optimizer_in_backward import _apply_optimizer_in_backward as theirs
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.nn.parallel import DistributedDataParallel

import commhub

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from torch import Tensor, nn

_HELD = "_commhub_in_backward"
"""The attribute of a parameter that holds its optimizers. PyTorch's own would make DDP take the model's one hook."""
_TAKEN_BY_FSDP = "_fsdp_flattened"
"""The attribute of a parameter that an FSDP model has sharded, or made of sharded ones."""
_WRAPPED_BY_FSDP = "_fsdp_wrapped_module"
"""The name of what an FSDP module wraps. Its class would take its time to load, for this one question."""
_unclaimed: weakref.WeakKeyDictionary[torch.optim.Optimizer, Unclaimed] = weakref.WeakKeyDictionary()
"""By optimizer, as long as no DDP or FSDP model steps it."""
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
    registers on every rank. One optimizer serves all parameters of a call. Parameters of FSDP models are left to
    PyTorch's own function, and have an optimizer each: FSDP steps them by itself, and wants ``use_orig_params=True``.

    Args:
        optimizer_class: made with the parameters and ``optimizer_kwargs``.
        params: the parameters, before or after a model wraps them, and before its first forward.
        optimizer_kwargs: for the optimizer.
        register_hook: step parameters that no DDP or FSDP model holds. Otherwise something else does that.
    """
    apply = partial(theirs, optimizer_class, optimizer_kwargs=dict(optimizer_kwargs), register_hook=register_hook)
    parameters: list[Any] = []
    for parameter in params:
        if hasattr(parameter, _TAKEN_BY_FSDP):
            apply([parameter])
        else:
            parameters.append(parameter)
    if not parameters:
        return
    optimizer = optimizer_class(parameters, **optimizer_kwargs)
    handles = []
    for parameter in parameters:
        setattr(parameter, _HELD, Held([*_optimizers_of(parameter), optimizer]))
        if register_hook:
            handles.append(parameter.register_post_accumulate_grad_hook(_step_alone(optimizer)))
    _unclaimed[optimizer] = Unclaimed(handles, apply)
    if not _watching:
        _watching.append(register_module_forward_pre_hook(_claim))


def _get_in_backward_optimizers(module: nn.Module) -> list[torch.optim.Optimizer]:
    """The optimizers of a module's parameters that step in backward, to save and load them; each once."""
    return list(dict.fromkeys(one for p in module.parameters() for one in _optimizers_of(p)))


@attrs.frozen
class Unclaimed:
    """What there is to undo when a model claims an optimizer.

    Attributes:
        handles: on its parameters.
        apply: PyTorch's function, to be called with parameters.
    """

    handles: list[Any]
    apply: Callable[[list[Tensor]], None]


class Held(list[torch.optim.Optimizer]):
    """A parameter's optimizers, in the order in which they were applied. Whoever saves the parameter saves none."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (type(None), ())


def _optimizers_of(parameter: Tensor) -> list[torch.optim.Optimizer]:
    return getattr(parameter, _HELD, None) or getattr(parameter, "_in_backward_optimizers", None) or []


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
    """Before a module's forward: if it is a DDP model that holds parameters of ours, register the hook on it.

    What an FSDP model has taken it steps by itself.
    """
    if isinstance(module, DistributedDataParallel):
        held = {one for p in module._module_parameters for one in _optimizers_of(p)}
        mine = [one for one in _unclaimed if one in held]
        if mine:
            commhub.register(module, "optimizer_overlap", step="auto", optimizer=mine)
        for optimizer in mine:
            _let_go(optimizer)
    elif _WRAPPED_BY_FSDP in module._modules:
        for optimizer in list(_unclaimed):
            _leave_to_pytorch(optimizer)
    if not _unclaimed and _watching:
        _watching.pop().remove()


def _leave_to_pytorch(optimizer: torch.optim.Optimizer) -> None:
    """Have PyTorch's function make optimizers of their own for those of its parameters that FSDP has taken since."""
    for group in optimizer.param_groups:
        for parameter in [p for p in group["params"] if hasattr(p, _TAKEN_BY_FSDP)]:
            group["params"] = [p for p in group["params"] if p is not parameter]
            if hasattr(parameter, _HELD):
                delattr(parameter, _HELD)
            _unclaimed[optimizer].apply([parameter])
    if not any(group["params"] for group in optimizer.param_groups):
        _let_go(optimizer)


def _let_go(optimizer: torch.optim.Optimizer) -> None:
    """Something else steps it from now on."""
    for handle in _unclaimed.pop(optimizer).handles:
        handle.remove()
