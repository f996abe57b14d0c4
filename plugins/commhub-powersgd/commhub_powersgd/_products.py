"""The fastest way of multiplying matrices by thin factors where they are."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ._compiled import Fused
from ._on_device import OnDevice
from ._on_host import OnHost

if TYPE_CHECKING:
    from torch import Tensor

    from ._compiled import Compiled
    from ._factors import Products


def products(m: Tensor, rank: int, compiled: Compiled | None = None) -> Products:
    """What multiplies the matrices ``m`` by factors of this rank where they are, with compiled passes if there are."""
    if m.device.type != "cpu":
        return OnDevice(m, rank)
    passes = None if compiled is None else compiled.passes(m.dtype, rank)
    return OnHost(m, rank) if passes is None else Fused(m, rank, passes)
