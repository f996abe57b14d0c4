"""Average in bfloat16: half the bytes of float32, with its range.

Importing this package loads no torch; ``Bf16`` is loaded when it is first asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ._hook import Bf16

__all__ = ["Bf16"]


def __getattr__(name: str) -> object:
    if name == "Bf16":
        from ._hook import Bf16

        return Bf16
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
