"""Batched PowerSGD: a whole bucket of gradients as one square matrix, sent as two thin factors.

Importing this package loads no torch; ``BatchedPowerSGD`` is loaded when it is first asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ._hook import BatchedPowerSGD

__all__ = ["BatchedPowerSGD"]


def __getattr__(name: str) -> object:
    if name == "BatchedPowerSGD":
        from ._hook import BatchedPowerSGD

        return BatchedPowerSGD
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
