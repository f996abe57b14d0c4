"""Hooks on a user's modules and optimizers: they keep nothing alive, and copies of what they are on go without them."""

from __future__ import annotations

import contextlib
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.parallel import DistributedDataParallel

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from torch import nn


class Listener:
    """Calls a method of an object for as long as there is the object, outside of what is compiled."""

    def __init__(self, method: Callable[..., Any]) -> None:
        reference = weakref.WeakMethod(method)

        def tell(*about: Any) -> Any:
            method = reference()
            return None if method is None else method(*about)

        self._tell: Callable[..., Any] = torch.compiler.disable(tell)

    def __call__(self, *about: Any) -> Any:
        """What the method returns."""
        return self._tell(*about)

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (contextlib.nullcontext(), "__exit__")  # does nothing, where commhub is not installed too


def is_collective(module: nn.Module) -> bool:
    """Whether the module's next forward takes all ranks: DDP sends the buffers of rank 0, in an evaluation too."""
    return isinstance(module, DistributedDataParallel) and bool(module.will_sync_module_buffers())


def bare(module: nn.Module) -> nn.Module:
    """The module that computes: its mode is what counts, whatever mode its wrapper says it is in."""
    return module.module if isinstance(module, DistributedDataParallel) else module


def with_closure(
    args: tuple[Any, ...], kwargs: dict[str, Any], around: Callable[[], AbstractContextManager[None]]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """The arguments of an optimizer's step with its closure called within ``around()``; ``None`` without a closure."""
    closure = args[1] if len(args) > 1 else kwargs.get("closure")
    if not callable(closure):
        return None

    def evaluated(*inputs: Any, **more: Any) -> object:
        with around():
            return closure(*inputs, **more)

    return ((args[0], evaluated, *args[2:]), kwargs) if len(args) > 1 else (args, {**kwargs, "closure": evaluated})
