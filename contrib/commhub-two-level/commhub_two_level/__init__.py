"""Average within each host, then between hosts with any hook.

Importing this package loads no torch; ``TwoLevel`` is loaded when it is first asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ._hook import TwoLevel

__all__ = ["TwoLevel"]


def __getattr__(name: str) -> object:
    if name == "TwoLevel":
        from ._hook import TwoLevel

        return TwoLevel
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
