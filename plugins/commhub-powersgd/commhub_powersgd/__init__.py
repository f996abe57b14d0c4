"""PowerSGD: send two thin factors instead of each gradient matrix, and what they miss with the next step.

Importing this package loads no torch; ``PowerSGD`` is loaded when it is first asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ._hook import PowerSGD

__all__ = ["PowerSGD"]


def __getattr__(name: str) -> object:
    if name == "PowerSGD":
        from ._hook import PowerSGD

        return PowerSGD
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
