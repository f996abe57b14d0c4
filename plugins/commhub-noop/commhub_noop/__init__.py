"""No communication: every rank keeps its own gradient. For headroom analysis only.

Importing this package loads no torch; ``Noop`` is loaded when it is first asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ._hook import Noop

__all__ = ["Noop"]


def __getattr__(name: str) -> object:
    if name == "Noop":
        from ._hook import Noop

        return Noop
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
