"""Rows of numbers as codes with their marks, each row for itself or all rows of a parameter alike."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ._coding import Coding, coder, inverse_of, marks_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    Pieces = Sequence[tuple[Tensor, slice]]
    """Values (rows, row) and which rows they are."""


class Rows:
    """Codes and marks of some rows, kept between steps.

    Args:
        coding: how they are coded.
        parameter: for each row the number of its parameter, int64.
        parameters: how many there are; ``parameter`` may name one more, for rows of none.
        dtype: of the values and the marks.

    Attributes:
        codes: int8 (rows, row_bytes).
        marks: (rows, marks).
        table: where a parameter's rows share their marks: (parameters + 1, marks).
    """

    def __init__(self, coding: Coding, parameter: Tensor, parameters: int, dtype: torch.dtype) -> None:
        device = parameter.device
        self.coder = coder(coding)
        self.parameter = parameter
        self.codes = torch.zeros(len(parameter), coding.row_bytes, dtype=torch.int8, device=device)
        self.marks = torch.zeros(len(parameter), coding.marks, dtype=dtype, device=device)
        self.inverses = torch.zeros(len(parameter), 1, dtype=dtype, device=device)
        self.table = torch.zeros(parameters + 1, coding.marks, dtype=dtype, device=device)

    def encode(self, pieces: Pieces, noise: Tensor | None, *, keeping: bool) -> None:
        """Fill codes and marks. With ``keeping``, the pieces hold afterwards what the codes miss of them."""
        kernels = self.coder
        if kernels.coding.whole:
            self._measure(pieces)
        else:
            for values, rows in pieces:
                kernels.measure(values, self.marks[rows], self.inverses[rows])
        encode = kernels.encode_keeping if keeping else kernels.encode
        for values, rows in pieces:
            chance = () if noise is None else (noise[rows],)
            encode(values, self.marks[rows], self.inverses[rows], self.codes[rows], *chance)

    def _measure(self, pieces: Pieces) -> None:
        """One scale per parameter, from all its rows."""
        kernels, coding = self.coder, self.coder.coding
        extents = torch.zeros_like(self.marks)
        for values, rows in pieces:
            kernels.extents(values, extents[rows])
        index = self.parameter[:, None].expand_as(extents)
        found = torch.zeros_like(self.table).scatter_reduce_(0, index, extents, "amax")
        # No number where an extent is none, whatever amax makes of those.
        found.index_add_(0, self.parameter, extents * 0)
        self.table.copy_(marks_of(found, coding))
        torch.index_select(self.table, 0, self.parameter, out=self.marks)
        self.inverses.copy_(inverse_of(self.marks))
