"""Top-k sparsified gradients with error feedback and momentum correction.

Importing this package loads no torch; ``TopK`` is loaded when it is first asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ._hook import TopK

__all__ = ["TopK"]


def __getattr__(name: str) -> object:
    if name == "TopK":
        from ._hook import TopK

        return TopK
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
