"""Rows of numbers as codes with their scales, each row for itself or all rows of a parameter alike."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import attrs
import torch
from torch import Tensor

from ._codec import code_dtype

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ._codec import Codec, FullCodec


@attrs.frozen
class Run:
    """Rows that follow one another.

    Attributes:
        rows: which they are.
        counts: how many elements of each are its parameter's, (rows, 1).
        codes: theirs.
        scales: theirs.
    """

    rows: slice
    counts: Tensor
    codes: Tensor
    scales: Tensor


class Rows:
    """Codes and scales of some rows, kept between steps.

    Args:
        codec: codes them.
        parameter: for each row the number of its parameter, int64.
        parameters: how many there are; ``parameter`` may name one more, for rows of none.
        dtype: of the values and the scales.
        runs: all rows once, in order: how many follow one another, and their counts.
        memory: for the codes, and for what travels of the scales; its own by default.

    Attributes:
        codes: (rows, bytes).
        scales: (rows, scales).
        table: where a parameter's rows share their scales: (parameters + 1, scales); else ``None``.
    """

    def __init__(
        self,
        codec: Codec,
        parameter: Tensor,
        parameters: int,
        dtype: torch.dtype,
        runs: Sequence[tuple[int, Tensor]],
        memory: tuple[Tensor | None, Tensor | None] = (None, None),
    ) -> None:
        device = parameter.device
        codes, travels = memory
        whole = getattr(codec, "whole", False)
        self.codec, self.parameter = codec, parameter
        if codes is None:
            codes = torch.zeros(len(parameter), codec.row_bytes(dtype), dtype=code_dtype(codec), device=device)
        if travels is None:
            travels = torch.zeros(parameters + 1 if whole else len(parameter), codec.scales, dtype=dtype, device=device)
        self.codes = codes
        self.table: Tensor | None = travels if whole else None
        self.scales = travels.new_zeros(len(parameter), codec.scales) if whole else travels
        self.runs: list[Run] = []
        end = 0
        for count, counts in runs:
            rows = slice(end, end := end + count)
            self.runs.append(Run(rows, counts, self.codes[rows], self.scales[rows]))

    def encode(self, pieces: Sequence[Tensor], noise: Tensor | None, *, keeping: bool) -> None:
        """Fill codes and scales from each run's values. With ``keeping``, those are afterwards what the codes miss."""
        if self.table is not None:
            self._measure(self.table, pieces)
        for values, run in zip(pieces, self.runs, strict=True):
            if noise is None:
                self.codec.encode(values, run.codes, run.scales, run.counts, keeping=keeping)
            else:
                chance = noise[run.rows]
                full = cast("FullCodec", self.codec)
                full.encode(values, run.codes, run.scales, run.counts, chance, keeping=keeping)

    def decode(self, pieces: Sequence[Tensor]) -> None:
        """Write what codes and scales stand for into each run's values."""
        for values, run in zip(pieces, self.runs, strict=True):
            self.codec.decode(run.codes, run.scales, values, adding=False)

    def _measure(self, table: Tensor, pieces: Sequence[Tensor]) -> None:
        """One set of scales per parameter, from all its rows."""
        codec = cast("FullCodec", self.codec)
        extents = torch.zeros_like(self.scales)
        for values, run in zip(pieces, self.runs, strict=True):
            codec.extents(values, extents[run.rows])
        index = self.parameter[:, None].expand_as(extents)
        found = torch.zeros_like(table).scatter_reduce_(0, index, extents, "amax")
        # No number where an extent is none, whatever amax makes of those.
        found.index_add_(0, self.parameter, extents * 0)
        table.copy_(codec.scales_of(found))
        torch.index_select(table, 0, self.parameter, out=self.scales)
