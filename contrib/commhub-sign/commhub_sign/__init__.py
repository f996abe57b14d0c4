"""Gradients as signs with a scale for each group, averaged in two steps, with error feedback.

Importing this package loads no torch; ``Sign`` is loaded when it is first asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ._hook import Sign

__all__ = ["Sign"]


def __getattr__(name: str) -> object:
    if name == "Sign":
        from ._hook import Sign

        return Sign
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
