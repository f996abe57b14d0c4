"""DiLoCo: local steps, and an outer optimizer on what they moved.

Importing this package loads no torch; ``DiLoCo`` is loaded when it is first asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ._averager import DiLoCo

__all__ = ["DiLoCo"]


def __getattr__(name: str) -> object:
    if name == "DiLoCo":
        from ._averager import DiLoCo

        return DiLoCo
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
