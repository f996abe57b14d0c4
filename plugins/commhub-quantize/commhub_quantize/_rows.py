"""Rows of numbers as codes with their marks, each row for itself or all rows of a parameter alike."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ._coding import Coding, marks_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ._work import Work

    Pieces = Sequence[tuple[Tensor, slice]]
    """Values (rows, row) and which rows they are."""


class Rows:
    """Codes and marks of some rows, kept between steps.

    Args:
        coding: how they are coded.
        work: codes them.
        parameter: for each row the number of its parameter, int64.
        parameters: how many there are; ``parameter`` may name one more, for rows of none.
        dtype: of the values and the marks.

    Attributes:
        codes: int8 (rows, row_bytes).
        marks: (rows, marks).
        table: where a parameter's rows share their marks: (parameters + 1, marks).
    """

    def __init__(self, coding: Coding, work: Work, parameter: Tensor, parameters: int, dtype: torch.dtype) -> None:
        device = parameter.device
        self.coding, self.work = coding, work
        self.parameter = parameter
        self.codes = torch.zeros(len(parameter), coding.row_bytes, dtype=torch.int8, device=device)
        self.marks = torch.zeros(len(parameter), coding.marks, dtype=dtype, device=device)
        self.table = torch.zeros(parameters + 1, coding.marks, dtype=dtype, device=device)

    def encode(self, pieces: Pieces, noise: Tensor | None, *, keeping: bool) -> None:
        """Fill codes and marks. With ``keeping``, the pieces hold afterwards what the codes miss of them."""
        if self.coding.whole:
            self._measure(pieces)
        for values, rows in pieces:
            chance = None if noise is None else noise[rows]
            self.work.encode(values, self.marks[rows], self.codes[rows], chance, keeping=keeping)

    def _measure(self, pieces: Pieces) -> None:
        """One scale per parameter, from all its rows."""
        extents = torch.zeros_like(self.marks)
        for values, rows in pieces:
            self.work.extents(values, extents[rows])
        index = self.parameter[:, None].expand_as(extents)
        found = torch.zeros_like(self.table).scatter_reduce_(0, index, extents, "amax")
        # No number where an extent is none, whatever amax makes of those.
        found.index_add_(0, self.parameter, extents * 0)
        self.table.copy_(marks_of(found, self.coding))
        torch.index_select(self.table, 0, self.parameter, out=self.marks)
