"""PowerSGD: send two thin factors instead of each gradient matrix, and what they miss with the next step.

Besides the hook, what another low-rank hook can be made of: ``power_iteration`` turns ``Approximation`` of matrices
into factors by all-reduces, with ``compiled_passes`` where there are any; ``Matrix`` and ``Source`` name matrices and
draw the same random factors for them on every rank; ``compare_bits`` has ranks see whether they compute alike;
``Tally`` and ``Limit`` keep what goes along with it.

Importing this package loads no torch; each name is loaded when it is first asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ._bits import compare_bits
    from ._bookkeeping import Tally
    from ._compiled import Compiled, compiled_passes
    from ._hook import PowerSGD
    from ._iteration import Approximation, power_iteration
    from ._layout import Matrix
    from ._limits import Limit
    from ._random import Source

__all__ = [
    "Approximation",
    "Compiled",
    "Limit",
    "Matrix",
    "PowerSGD",
    "Source",
    "Tally",
    "compare_bits",
    "compiled_passes",
    "power_iteration",
]

_HOMES = {
    "Approximation": "_iteration",
    "Compiled": "_compiled",
    "Limit": "_limits",
    "Matrix": "_layout",
    "PowerSGD": "_hook",
    "Source": "_random",
    "Tally": "_bookkeeping",
    "compare_bits": "_bits",
    "compiled_passes": "_compiled",
    "power_iteration": "_iteration",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
