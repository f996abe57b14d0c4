"""commhub's hooks in Accelerate: ``attach(accelerator, "fp16")`` before ``prepare``.

For the Trainer of Transformers see ``commhub_accelerate.transformers``. Importing this package loads neither torch nor
a framework; what it offers is loaded when it is first asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ._attach import Attached, attach

__all__ = ["Attached", "attach"]


def __getattr__(name: str) -> object:
    if name in __all__:
        return getattr(import_module(f"{__name__}._attach"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
