"""Modules of PyTorch's ``replicate()``: a DDP model without a forward of its own, which their first forward makes.

All that is said here about PyTorch's private names was seen in torch 2.13.
"""

from __future__ import annotations

import gc
import sys
import weakref
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

if TYPE_CHECKING:
    from collections.abc import Iterator

    Named = tuple[str, nn.Parameter]

_MODULE = "torch.distributed._composable.replicate"
_homes: weakref.WeakKeyDictionary[nn.Module, weakref.ref[nn.Module]] = weakref.WeakKeyDictionary()
"""By DDP model: the module that ``replicate()`` was given; or the DDP model itself, which a user has made."""


def state_of(module: nn.Module) -> Any:
    """What ``replicate()`` keeps for a module that it was given; ``None`` for any other module."""
    made: Any = sys.modules.get(_MODULE)  # who has called replicate() has imported it
    if made is None:
        return None
    states = module.__dict__.get(sys.modules["torch.distributed._composable.contract"].STATE_KEY, {})
    return next((state for state in states.values() if type(state) is made._ReplicateState), None)


def ddp_of(state: Any) -> DistributedDataParallel | None:
    """The DDP model of the module, once its first forward has made it."""
    made = vars(state).get("_ddp")
    if not isinstance(made, DistributedDataParallel):
        return None
    _homes[made] = weakref.ref(state.module)
    return made


def home_of(model: nn.Module) -> nn.Module:
    """The module whose forward passes and names count: for a DDP model of ``replicate()`` that which this was given."""
    if not isinstance(model, DistributedDataParallel) or type(model.module) is not nn.ParameterList:
        return model
    if model not in _homes and (made := sys.modules.get(_MODULE)) is not None:
        _homes[model] = weakref.ref(model)
        for state in [one for one in gc.get_objects() if type(one) is made._ReplicateState]:
            ddp_of(state)
    home = _homes.get(model)
    return (None if home is None else home()) or model


def replicated(module: nn.Module) -> Iterator[Named] | None:
    """The parameters that ``replicate()`` averages or will, by their names in the module; ``None`` for any other.

    Once the DDP model is made they stay the same, and it may train fewer.
    """
    state = state_of(module)
    if state is None:
        return None
    if ddp_of(state) is None and state._init_args:
        whole, ignored = state._init_args
        every = type(state)()
        left_out = {p for one in ignored for p in one.parameters()}
        left_out.update(p for one in whole.modules() if _is_sharded(one) for p in one.parameters())
        every._collect_params(whole, set(ignored), left_out)
        state = every
    return _once(state)


def ignored_buffers(module: nn.Module) -> set[str]:
    """The names of the buffers of parts that ``replicate()`` was told to ignore: it averages no parameter of theirs."""
    pairs = replicated(module)
    if pairs is None:
        return set()
    averaged = {id(p) for _, p in pairs}
    found: set[str] = set()
    for name, part in module.named_modules():
        every = list(part.parameters())
        if every and not any(id(p) in averaged for p in every):
            found.update(f"{name}.{buffer}" if name else buffer for buffer, _ in part.named_buffers())
    return found


def _once(state: Any) -> Iterator[Named]:
    seen = set()
    for name, parameter in zip(state._param_names, state._param_list, strict=True):
        if id(parameter) not in seen:
            seen.add(id(parameter))
            yield name, parameter


def _is_sharded(module: nn.Module) -> bool:
    sharded: bool = sys.modules[_MODULE]._is_fully_sharded(module)
    return sharded
