"""The optimizer's step for a bucket's parameters as soon as that bucket is reduced, while later buckets travel.

Importing this package loads no torch; the hooks are loaded when they are first asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ._hook import OptimizerOverlap
    from ._zero import ZeroOverlap

__all__ = ["OptimizerOverlap", "ZeroOverlap"]

_HOMES = {"OptimizerOverlap": "_hook", "ZeroOverlap": "_zero"}


def __getattr__(name: str) -> object:
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
