"""Numbers as 8-bit floats, and back: the codec that ``commhub.toolkit.TwoStep`` asks for."""

from __future__ import annotations

from typing import ClassVar

import attrs
import torch
from torch import Tensor

from commhub.toolkit import Kernel

_LARGEST = 448.0
"""The largest number that e4m3 holds: 1.75 times 2^8. It has no infinity."""


@attrs.frozen
class E4M3:
    """Four bits of exponent and three of mantissa; a row's scale takes its largest magnitude to 448.

    Attributes:
        row: elements that share a scale.
    """

    row: int
    scales: ClassVar[int] = 1

    def row_bytes(self, _dtype: torch.dtype) -> int:
        """A byte for each element."""
        return self.row

    def encode(self, rows: Tensor, codes: Tensor, scales: Tensor, _counts: Tensor, *, keeping: bool) -> None:
        """Write the nearest codes, and scales. What is not finite makes its row's scale so."""
        (_encode_keeping if keeping else _encode)(rows, codes, scales)

    def decode(self, codes: Tensor, scales: Tensor, rows: Tensor, *, adding: bool) -> None:
        """Write scale times code, or add it."""
        (_accumulate if adding else _decode)(codes, scales, rows)


def encode(rows: Tensor, codes: Tensor, scales: Tensor) -> None:
    largest = rows.abs().amax(1, keepdim=True)
    # What is too small to divide by counts as zero, and waits.
    scales.copy_(torch.where(largest < torch.finfo(rows.dtype).tiny * 512, 0.0, largest) / _LARGEST)
    scaled = rows * torch.where(scales == 0, 0.0, 1 / scales)
    # The largest may come out a little above 448, which may not be cast to a finite number.
    codes.copy_(scaled.clamp_(-_LARGEST, _LARGEST).to(torch.float8_e4m3fn).view(torch.uint8))


def encode_keeping(rows: Tensor, codes: Tensor, scales: Tensor) -> None:
    encode(rows, codes, scales)
    rows -= _values(codes, scales)


def decode(codes: Tensor, scales: Tensor, rows: Tensor) -> None:
    rows.copy_(_values(codes, scales))


def accumulate(codes: Tensor, scales: Tensor, rows: Tensor) -> None:
    rows += _values(codes, scales)


def _values(codes: Tensor, scales: Tensor) -> Tensor:
    return codes.view(torch.float8_e4m3fn).to(scales.dtype).mul_(scales)


_encode, _encode_keeping = Kernel(encode), Kernel(encode_keeping)  # in blocks that stay in the cache
_decode, _accumulate = Kernel(decode), Kernel(accumulate)
