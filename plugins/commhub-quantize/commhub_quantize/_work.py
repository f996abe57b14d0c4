"""What encodes and decodes rows: tensor operations, or the same arithmetic compiled for the host."""

from __future__ import annotations

from functools import cache
from typing import Protocol

import torch
from torch import Tensor

from commhub.toolkit import Kernel

from ._coding import Coding, digits_of, extent, inverse_of, marks_of, pack, stand_for, unpack
from ._compiled import compiled_passes


class Work(Protocol):
    """Rows of values (rows, row) and their codes, int8 (rows, row_bytes), and marks (rows, marks) in their dtype.

    All are contiguous.
    """

    def extents(self, values: Tensor, out: Tensor) -> None:
        """Write what the marks of many rows are found from, (rows, marks)."""

    def encode(self, values: Tensor, marks: Tensor, codes: Tensor, noise: Tensor | None, *, keeping: bool) -> None:
        """Write codes, and each row's own marks; where a coding shares them among rows, ``marks`` gives them.

        Marks that are given cover the values: they were found from extents as large. With ``keeping``, ``values`` hold
        afterwards what the codes miss of them. ``noise``, where rounding is stochastic, is like them and between 0
        and 1.
        """

    def decode(self, codes: Tensor, marks: Tensor, values: Tensor, *, adding: bool) -> None:
        """Write what codes stand for, or add it."""


class Kernels:
    """The work by tensor operations; fused by PyTorch's compiler on a device."""

    def __init__(self, coding: Coding) -> None:
        self._coding = coding

        def extents(values: Tensor, out: Tensor) -> None:
            out.copy_(extent(values, coding))

        def digits(values: Tensor, marks: Tensor, codes: Tensor, noise: Tensor | None) -> Tensor:
            if not coding.whole:
                marks.copy_(marks_of(extent(values, coding), coding))
            found = digits_of(values, marks, inverse_of(marks), noise, coding)
            codes.copy_(pack(found, coding))
            return found

        def encode(values: Tensor, marks: Tensor, codes: Tensor, noise: Tensor | None = None) -> None:
            digits(values, marks, codes, noise)

        def encode_keeping(values: Tensor, marks: Tensor, codes: Tensor, noise: Tensor | None = None) -> None:
            values.sub_(stand_for(digits(values, marks, codes, noise), marks, coding))

        def decode(codes: Tensor, marks: Tensor, values: Tensor) -> None:
            parts = values.chunk(8 // coding.bits, 1)
            for part, found in zip(parts, unpack(codes, coding), strict=True):
                part.copy_(stand_for(found, marks, coding))

        def accumulate(codes: Tensor, marks: Tensor, values: Tensor) -> None:
            parts = values.chunk(8 // coding.bits, 1)
            for part, found in zip(parts, unpack(codes, coding), strict=True):
                part.add_(stand_for(found, marks, coding))

        self._extents = Kernel(extents)
        self._encode, self._encode_keeping = Kernel(encode), Kernel(encode_keeping)
        self._decode, self._accumulate = Kernel(decode), Kernel(accumulate)

    def warm(self, values: Tensor, elements: int, *, keeping: bool) -> None:
        """Compile for rows like ``values``, which are overwritten, if ``elements`` in a step are worth it."""
        coding = self._coding
        marks = values.new_zeros(len(values), coding.marks)
        codes = values.new_zeros(len(values), coding.row_bytes, dtype=torch.int8)
        noise = (torch.zeros_like(values),) if coding.stochastic else ()
        if coding.whole:
            self._extents.warm(values, marks, elements=elements)
        encode = self._encode_keeping if keeping else self._encode
        encode.warm(values, marks, codes, *noise, elements=elements)
        self._decode.warm(codes, marks, values, elements=elements)
        self._accumulate.warm(codes, marks, values, elements=elements)

    def extents(self, values: Tensor, out: Tensor) -> None:
        self._extents(values, out)

    def encode(self, values: Tensor, marks: Tensor, codes: Tensor, noise: Tensor | None, *, keeping: bool) -> None:
        encode = self._encode_keeping if keeping else self._encode
        encode(values, marks, codes, *(() if noise is None else (noise,)))

    def decode(self, codes: Tensor, marks: Tensor, values: Tensor, *, adding: bool) -> None:
        (self._accumulate if adding else self._decode)(codes, marks, values)


@cache
def kernels(coding: Coding) -> Kernels:
    """One set per coding in a process, so that each is compiled once."""
    return Kernels(coding)


def work_on(coding: Coding, dtype: torch.dtype, device: torch.device, elements: int, *, keeping: bool) -> Work:
    """What works on rows in ``dtype``; compiled first, if ``elements`` in a step are worth it."""
    if device.type == "cpu":
        return compiled_passes(coding, dtype, elements) or kernels(coding)
    values = torch.zeros(1024, coding.row, dtype=dtype, device=device)
    kernels(coding).warm(values, elements, keeping=keeping)
    return kernels(coding)
