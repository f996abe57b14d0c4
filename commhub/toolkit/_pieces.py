"""A section's elements as rows: whole rows where they lie, and short ones, filled up with zeros, apart."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from ._layout import Section, Stretch


class Pieces:
    """What a codec is given of values, run by run.

    Args:
        section: which elements, in rows of how many.
        dtype: of the values.
        device: theirs.
    """

    def __init__(self, section: Section, dtype: torch.dtype, device: torch.device) -> None:
        self._section, self._width = section, section.width
        self._short = torch.zeros(len(section.short), self._width, dtype=dtype, device=device)

    def runs(self) -> list[tuple[int, Tensor]]:
        """How many rows follow one another, and how many elements of each are its parameter's, (rows, 1), int64."""
        section, device = self._section, self._short.device
        counts = torch.tensor(section.counts(), device=device)[:, None]
        alike = counts.new_tensor([[self._width]])  # the same for every full row
        full = [stretch.length // self._width for stretch in section.full]
        runs = [(count, alike.expand(count, 1)) for count in full]
        return [*runs, (len(section.short), counts[sum(full) : section.rows].clone())] if section.short else runs

    def of(self, values: Tensor) -> list[Tensor]:
        """Views of ``values`` (1-D) as rows, and memory for the short ones."""
        pieces = [part_of(values, stretch).view(-1, self._width) for stretch in self._section.full]
        return [*pieces, self._short] if len(self._short) else pieces

    def take_short(self, values: Tensor) -> None:
        """Fill the short rows."""
        for line, stretch in zip(self._short, self._section.short, strict=True):
            line[: stretch.length].copy_(part_of(values, stretch))
            line[stretch.length :].zero_()  # not zero after a step that was not finite

    def put_short(self, values: Tensor) -> None:
        """Write them into ``values``."""
        for line, stretch in zip(self._short, self._section.short, strict=True):
            part_of(values, stretch).copy_(line[: stretch.length])


def part_of(values: Tensor, stretch: Stretch) -> Tensor:
    """The elements of ``values`` (1-D) that a stretch means."""
    return values.narrow(0, stretch.offset, stretch.length)
