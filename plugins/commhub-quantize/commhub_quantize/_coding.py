"""Numbers as codes of a few bits, and back: row by row, each row with the scale that it is given or finds itself.

A code is a signed digit d of 8, 4 or 2 bits. Symmetric, it stands for d s; affine, for (d - z) s with a zero point z,
so that zero stays exactly zero either way. Narrow digits share a byte: the k-th part of a row lies in the k-th bits.
"""

from __future__ import annotations

import attrs
import torch
from torch import Tensor


@attrs.frozen(kw_only=True)
class Coding:
    """How rows are coded.

    Attributes:
        bits: of a code: 8, 4 or 2.
        row: elements in a row; a multiple of what a byte holds.
        symmetric: codes stand for multiples of the scale; otherwise also for an offset.
        whole: one scale for all rows of a parameter, instead of one for each row.
        stochastic: round up or down by chance, so that the expectation is exact.
    """

    bits: int
    row: int
    symmetric: bool = True
    whole: bool = False
    stochastic: bool = False

    @property
    def row_bytes(self) -> int:
        """Bytes of a row's codes."""
        return self.row * self.bits // 8

    @property
    def marks(self) -> int:
        """Numbers that come with the codes: the scale, and a zero point if affine."""
        return 1 if self.symmetric else 2

    @property
    def half(self) -> int:
        """Digits run from -half to half - 1."""
        return 1 << (self.bits - 1)

    @property
    def top(self) -> int:
        """The largest digit; a symmetric coding's smallest is its negative."""
        return self.half - 1


def extent(values: Tensor, coding: Coding) -> Tensor:
    """What a row's scale depends on: its largest magnitude (rows, 1), or its range with zero inside it (rows, 2)."""
    if coding.symmetric:
        return values.abs().amax(1, keepdim=True)
    low, high = values.amin(1, keepdim=True), values.amax(1, keepdim=True)
    return torch.cat([-low, high], 1).clamp(min=0)


def marks_of(extents: Tensor, coding: Coding) -> Tensor:
    """Scale, and zero point if affine, from extents: (rows, marks). What is too small to divide by counts as zero."""
    floor = torch.finfo(extents.dtype).tiny * 256
    if coding.symmetric:
        return torch.where(extents < floor, 0.0, extents) / coding.top
    below, above = extents[:, :1], extents[:, 1:]
    scale = (below + above) / (2 * coding.half - 1)
    scale = torch.where(scale < floor, 0.0, scale)
    zero = torch.where(scale == 0, 0.0, torch.round(below / scale)) - coding.half
    return torch.cat([scale, zero], 1)


def inverse_of(marks: Tensor) -> Tensor:
    """One over the scale, or zero where that is zero: (rows, 1)."""
    scale = marks[:, :1]
    return torch.where(scale == 0, 0.0, 1 / scale)


def digits_of(values: Tensor, marks: Tensor, inverse: Tensor, noise: Tensor | None, coding: Coding) -> Tensor:
    """The digits that come nearest, as numbers: (rows, row)."""
    scaled = values * inverse
    digits = torch.round(scaled) if noise is None else torch.floor(scaled + noise)
    if coding.symmetric:
        return digits.clamp(-coding.top, coding.top)
    return (digits + marks[:, 1:]).clamp(-coding.half, coding.half - 1)


def pack(digits: Tensor, coding: Coding) -> Tensor:
    """Bytes (rows, row_bytes), as numbers between -128 and 127."""
    parts = digits.chunk(8 // coding.bits, 1)
    packed = parts[-1]
    for part in reversed(parts[:-1]):
        packed = packed * (1 << coding.bits) + (part + coding.half)
    return packed


def unpack(codes: Tensor, coding: Coding) -> list[Tensor]:
    """The digits in the parts that ``pack`` joined, int8; each (rows, row_bytes)."""
    if coding.bits == 8:
        return [codes]
    count, mask = 8 // coding.bits, (1 << coding.bits) - 1
    low = [((codes >> (coding.bits * k)) & mask) - coding.half for k in range(count - 1)]
    return [*low, codes >> (coding.bits * (count - 1))]


def stand_for(digits: Tensor, marks: Tensor, coding: Coding) -> Tensor:
    """The values that digits stand for."""
    return digits * marks[:, :1] if coding.symmetric else (digits - marks[:, 1:]) * marks[:, :1]
