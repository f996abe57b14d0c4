"""Local SGD: a hook, two averagers of parameters, and an optimizer for scripts written for PyTorch's.

Importing this package loads no torch; what it offers is loaded when it is first asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ._averagers import Hierarchical, Periodic
    from ._hook import PostLocalSGD
    from ._optimizer import PostLocalSGDOptimizer

__all__ = ["Hierarchical", "Periodic", "PostLocalSGD", "PostLocalSGDOptimizer"]

_HOMES = {
    "Hierarchical": "_averagers",
    "Periodic": "_averagers",
    "PostLocalSGD": "_hook",
    "PostLocalSGDOptimizer": "_optimizer",
}


def __getattr__(name: str) -> object:
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
