"""Groups of numbers as one bit each and a scale, and back: the codec that ``commhub.toolkit.TwoStep`` asks for."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import attrs
import torch

from commhub.toolkit import Kernel

if TYPE_CHECKING:
    from torch import Tensor


@attrs.frozen
class Signs:
    """Signs of the numbers of a group, and their mean absolute value.

    A bit says that a number is below zero, so that zero counts as positive.

    Attributes:
        row: elements of a group, a multiple of 8.
    """

    row: int
    scales: ClassVar[int] = 1

    def row_bytes(self, _dtype: torch.dtype) -> int:
        """Bytes of a group's signs."""
        return self.row // 8

    def encode(self, rows: Tensor, codes: Tensor, scales: Tensor, counts: Tensor, *, keeping: bool) -> None:
        """Write signs and scales; what fills a group is zero, and does not count for its mean."""
        (_encode_keeping if keeping else _encode)(rows, codes, scales, counts)

    def decode(self, codes: Tensor, scales: Tensor, rows: Tensor, *, adding: bool) -> None:
        """Write scale times sign, or add it."""
        (_accumulate if adding else _decode)(codes, scales, rows)


def _signed(codes: Tensor, scales: Tensor) -> Tensor:
    shifts = torch.arange(8, dtype=torch.uint8, device=codes.device)
    bits = (codes.unsqueeze(2) >> shifts) & 1
    return (1 - 2 * bits.view(len(codes), -1).to(scales.dtype)) * scales


def encode(rows: Tensor, codes: Tensor, scales: Tensor, counts: Tensor) -> None:
    torch.div(rows.abs().sum(1, keepdim=True), counts, out=scales)
    weights = 1 << torch.arange(8, dtype=torch.uint8, device=rows.device)
    bits = (rows < 0).view(len(rows), -1, 8)
    torch.sum(bits * weights, 2, dtype=torch.uint8, out=codes)


def encode_keeping(rows: Tensor, codes: Tensor, scales: Tensor, counts: Tensor) -> None:
    encode(rows, codes, scales, counts)
    rows -= _signed(codes, scales)


def decode(codes: Tensor, scales: Tensor, rows: Tensor) -> None:
    rows.copy_(_signed(codes, scales))


def accumulate(codes: Tensor, scales: Tensor, rows: Tensor) -> None:
    rows += _signed(codes, scales)


_encode, _encode_keeping = Kernel(encode), Kernel(encode_keeping)
_decode, _accumulate = Kernel(decode), Kernel(accumulate)
