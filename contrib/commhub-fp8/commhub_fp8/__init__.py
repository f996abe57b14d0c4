"""Gradients as 8-bit floats with a scale for each group, averaged in two steps, with error feedback.

Importing this package loads no torch; ``FP8`` is loaded when it is first asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ._hook import FP8

__all__ = ["FP8"]


def __getattr__(name: str) -> object:
    if name == "FP8":
        from ._hook import FP8

        return FP8
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
