"""Quantized gradients: an all-reduce of 8, 4 or 2 bits in two steps, whatever the number of ranks.

Importing this package loads no torch; the hooks are loaded when they are first asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ._hook import QuantizePerChannel, QuantizePerTensor

__all__ = ["QuantizePerChannel", "QuantizePerTensor"]


def __getattr__(name: str) -> object:
    if name in __all__:
        from . import _hook

        return getattr(_hook, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
