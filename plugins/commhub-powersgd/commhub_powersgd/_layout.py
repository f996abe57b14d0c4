"""Which parameters are compressed, and as matrices of what size. Depends on the model alone, never on buckets."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

import attrs

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch


@attrs.frozen
class Matrix:
    """A parameter's gradient as the matrix that its memory is: ``rows`` x ``cols``, sent at rank ``rank``."""

    name: str
    rows: int
    cols: int
    rank: int


def as_matrix(
    name: str,
    shape: Sequence[int],
    strides: Sequence[int],
    dtype: torch.dtype,
    *,
    rank: int,
    min_compression_rate: float,
) -> Matrix | None:
    """The matrix to compress, or ``None`` for a parameter that goes dense.

    The rows run along the dimension of the largest stride, so that the gradient's memory is the matrix: that is
    (shape[0], -1) for a contiguous tensor, and for channels_last with the columns in another order. A transposed
    matrix is compressed as its transpose. Compressed is what has two dimensions, is real, and has
    ``min_compression_rate`` times more elements than its factors (Vogels et al. 2019, section 3).
    """
    if len(shape) < 2 or dtype.is_complex or not dtype.is_floating_point or not prod(shape):
        return None
    rows = max(zip(strides, shape, strict=True))[1]
    cols = prod(shape) // rows
    rank = min(rows, cols, rank)
    if (rows + cols) * rank * min_compression_rate < rows * cols:
        return Matrix(name, rows, cols, rank)
    return None
