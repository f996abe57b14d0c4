"""Rows of numbers as codes with their scales, each row for itself or all rows of a parameter alike."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ._codec import Codec, FullCodec

    Pieces = Sequence[tuple[Tensor, Tensor, slice]]
    """Values (rows, row), how many of each row count (rows, 1), and which rows they are."""


class Rows:
    """Codes and scales of some rows, kept between steps.

    Args:
        codec: codes them.
        parameter: for each row the number of its parameter, int64.
        parameters: how many there are; ``parameter`` may name one more, for rows of none.
        dtype: of the values and the scales.

    Attributes:
        codes: uint8 (rows, bytes).
        scales: (rows, scales).
        table: where a parameter's rows share their scales: (parameters + 1, scales); else ``None``.
    """

    def __init__(self, codec: Codec, parameter: Tensor, parameters: int, dtype: torch.dtype) -> None:
        device = parameter.device
        self.codec, self.parameter = codec, parameter
        self.codes = torch.zeros(len(parameter), codec.row_bytes(dtype), dtype=torch.uint8, device=device)
        self.scales = torch.zeros(len(parameter), codec.scales, dtype=dtype, device=device)
        self.table: Tensor | None = None
        if getattr(codec, "whole", False):
            self.table = torch.zeros(parameters + 1, codec.scales, dtype=dtype, device=device)

    def encode(self, pieces: Pieces, noise: Tensor | None, *, keeping: bool) -> None:
        """Fill codes and scales. With ``keeping``, the pieces hold afterwards what the codes miss of them."""
        if self.table is not None:
            self._measure(self.table, pieces)
        for values, counts, rows in pieces:
            chance = {} if noise is None else {"noise": noise[rows]}
            self.codec.encode(values, self.codes[rows], self.scales[rows], counts, keeping=keeping, **chance)

    def _measure(self, table: Tensor, pieces: Pieces) -> None:
        """One set of scales per parameter, from all its rows."""
        codec = cast("FullCodec", self.codec)
        extents = torch.zeros_like(self.scales)
        for values, _, rows in pieces:
            codec.extents(values, extents[rows])
        index = self.parameter[:, None].expand_as(extents)
        found = torch.zeros_like(table).scatter_reduce_(0, index, extents, "amax")
        # No number where an extent is none, whatever amax makes of those.
        found.index_add_(0, self.parameter, extents * 0)
        table.copy_(codec.scales_of(found))
        torch.index_select(table, 0, self.parameter, out=self.scales)
