"""Calls that the compiler does not look into: a compiled step runs its backward, and what is called from there."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import torch
from torch.autograd import Variable

if TYPE_CHECKING:
    from collections.abc import Callable

P = ParamSpec("P")
R = TypeVar("R")
_outside: Callable[..., Any] | None = None


def uncompiled(function: Callable[P, R]) -> Callable[P, R]:
    """The function, for a caller that may be compiled: neither it nor anything that it calls is traced."""
    global _outside
    if _outside is None:  # not when this is imported: it loads the compiler, which DDP and optimizers load as well
        _outside = torch.compiler.disable(_call)
    return functools.partial(_outside, function)


def queue(callback: Callable[[], None]) -> None:
    """Have it called when this backward has ended, after what was queued before."""
    Variable._execution_engine.queue_callback(uncompiled(callback))


def _call(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return function(*args, **kwargs)
