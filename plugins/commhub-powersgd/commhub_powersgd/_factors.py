"""What every way of multiplying large matrices by thin factors has in common.

All are batched: M is (batch, n, m), P and Q are transposed, (batch, rank, n) and (batch, rank, m). Measured on one
core of an EPYC, MKL, M of 4096 x 1024 at rank 2: Q with factors by column takes 22 ms, by row 0.4 ms.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import attrs

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


@attrs.frozen(eq=False)
class Addends:
    """What to add to matrices, in place, before they are multiplied: together these take one pass over memory.

    Attributes:
        tensors: one for each matrix, n m elements in memory order; ``None`` adds nothing.
        scale: what they are multiplied by.
    """

    tensors: Sequence[Tensor | None]
    scale: float = 1.0


@attrs.frozen(eq=False)
class Factor:
    """One side of low-rank matrices, kept between steps, with what the passes of its owner take of it.

    Attributes:
        values: (batch, rank, n).
        runs: of a left factor, per matrix and run of rows, (rank, rows); (rows,) at rank 1.
        terms: per matrix what an outer product takes for each vector, (1, n). Of a left factor, per matrix and run,
            (rows, 1) for each vector. Beyond rank 8 one term holds all vectors.
        addresses: for compiled passes, of each matrix's vectors.
    """

    values: Tensor
    runs: Sequence[Sequence[Tensor]] = ()
    terms: Sequence[Any] = ()
    addresses: Sequence[int] = ()


class Products(Protocol):
    """Matrices M (batch, n, m) at one place in memory, with room for the factors of P Q^T.

    ``left`` and ``right`` are this rank's own P and Q, ``mean`` the one that the ranks averaged, of either side.
    """

    @property
    def left(self) -> Factor: ...
    @property
    def right(self) -> Factor: ...

    def averaged(self, *, left: bool) -> Factor:
        """Room for the mean P, or else for the mean Q; the content is undefined at first."""

    def multiply_right(self, q: Tensor, addends: Addends | None = None) -> None:
        """``left`` = P = M Q. With ``addends``, M is the sum from then on."""

    def multiply_left(self, p: Tensor, addends: Addends | None = None) -> None:
        """``left`` = P and ``right`` = Q = M^T P. With ``addends``, M is the sum from then on."""

    def parts(self) -> Sequence[slice]:
        """Which matrices to go on with together: all of them, or on the host one by one, what was seen last first."""

    def subtract(self, part: slice) -> None:
        """M = M - P Q^T with ``left`` and ``right``."""

    def store(self, part: slice, left: Factor, right: Factor) -> None:
        """M = P Q^T with these factors."""

    def exchange(self, i: int, left: Factor, right: Factor, error: Tensor) -> bool:
        """``error`` (n m elements) = M - P Q^T with ``left`` and ``right``, then M = P Q^T with these, in one pass.

        Returns whether the error is known to be finite.
        """


def addresses(tensor: Tensor) -> list[int]:
    """Of each of a batch."""
    first, spacing = tensor.data_ptr(), tensor.stride(0) * tensor.element_size()
    return [first + i * spacing for i in range(len(tensor))]
