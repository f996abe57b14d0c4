"""A section's numbers as tensors, made once for all ranks of a process: they take time and memory for every rank."""

from __future__ import annotations

from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import attrs
import torch

if TYPE_CHECKING:
    from torch import Tensor

    from ._layout import Section


@attrs.frozen(eq=False)
class Indices:
    """Int64, and never written to.

    Attributes:
        parameters: for each row, and the empty one, its parameter's number.
        counts: for each how many elements of it are its parameter's, (rows + 1, 1).
        shares: for each rank the rows that it owns, (p, rows of a share).
    """

    parameters: Tensor
    counts: Tensor
    shares: Tensor


_made: WeakKeyDictionary[Section, dict[torch.device, Indices]] = WeakKeyDictionary()


def indices(section: Section, device: torch.device) -> Indices:
    """Those of a section, on a device."""
    there = _made.setdefault(section, {})
    if device not in there:
        there[device] = Indices(
            torch.tensor(section.parameters(), device=device),
            torch.tensor(section.counts(), device=device)[:, None],
            torch.tensor(section.shares, device=device),
        )
    return there[device]
