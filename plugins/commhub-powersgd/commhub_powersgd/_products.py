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
    without_gaps = m.stride()[1:] == (m.shape[2], 1)
    passes = compiled.passes(m.dtype, rank) if compiled is not None and without_gaps else None
    return OnHost(m, rank) if passes is None else Fused(m, rank, passes)
