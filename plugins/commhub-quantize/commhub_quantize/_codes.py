"""The codec of one coding: what ``commhub.toolkit.TwoStep`` asks, done by compiled passes or tensor operations."""

from __future__ import annotations

from typing import ClassVar

import attrs
import torch
from torch import Tensor

from ._coding import Coding, marks_of
from ._work import Work, kernels, work_on


@attrs.frozen
class Codes:
    """Codes of a few bits. A row's scales are its marks: the scale, and a zero point if affine.

    Attributes:
        coding: how rows are coded.
        seed: of stochastic rounding, where there is one.
        work: what works on rows, by their dtype; tensor operations where a dtype was not prepared.
    """

    coding: Coding
    seed: int | None = None
    work: dict[torch.dtype, Work] = attrs.field(init=False, factory=dict, eq=False, repr=False)
    code: ClassVar[torch.dtype] = torch.int8
    bounded: ClassVar[bool] = True

    @property
    def row(self) -> int:
        """Elements of a row."""
        return self.coding.row

    @property
    def scales(self) -> int:
        """Numbers beside a row's codes."""
        return self.coding.marks

    @property
    def whole(self) -> bool:
        """Whether a parameter's rows share them."""
        return self.coding.whole

    def row_bytes(self, _dtype: torch.dtype) -> int:
        """Bytes of a row's codes."""
        return self.coding.row_bytes

    def prepare(self, dtype: torch.dtype, device: torch.device, elements: int, *, keeping: bool) -> None:
        """Compile, if so many elements in a step are worth it."""
        self.work[dtype] = work_on(self.coding, dtype, device, elements, keeping=keeping)

    def extents(self, rows: Tensor, out: Tensor) -> None:
        """What a parameter's marks are found from."""
        self._on(rows).extents(rows, out)

    def scales_of(self, extents: Tensor) -> Tensor:
        """A parameter's marks."""
        return marks_of(extents, self.coding)

    def encode(
        self,
        rows: Tensor,
        codes: Tensor,
        scales: Tensor,
        _counts: Tensor,
        noise: Tensor | None = None,
        *,
        keeping: bool,
    ) -> None:
        """Write codes and marks; zeros, which fill a row, change neither."""
        self._on(rows).encode(rows, scales, codes, noise, keeping=keeping)

    def decode(self, codes: Tensor, scales: Tensor, rows: Tensor, *, adding: bool) -> None:
        """Write what codes stand for, or add it."""
        self._on(rows).decode(codes, scales, rows, adding=adding)

    def _on(self, rows: Tensor) -> Work:
        return self.work.get(rows.dtype) or kernels(self.coding)
