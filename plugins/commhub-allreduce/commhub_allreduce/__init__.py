"""The plain average: what DDP does without a hook, bit for bit.

Importing this package loads no torch; ``Allreduce`` is loaded when it is first asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ._hook import Allreduce

__all__ = ["Allreduce"]


def __getattr__(name: str) -> object:
    if name == "Allreduce":
        from ._hook import Allreduce

        return Allreduce
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
