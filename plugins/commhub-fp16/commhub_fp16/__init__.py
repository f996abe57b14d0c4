"""Average in float16: half the bytes of float32.

Importing this package loads no torch; ``Fp16`` is loaded when it is first asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ._hook import Fp16

__all__ = ["Fp16"]


def __getattr__(name: str) -> object:
    if name == "Fp16":
        from ._hook import Fp16

        return Fp16
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
