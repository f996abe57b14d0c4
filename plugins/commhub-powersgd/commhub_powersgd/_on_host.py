"""Products on the host, as fast as tensor operations allow, with bits that no layout changes.

All time goes to moving matrices at rank 1. Each is taken in runs of rows, so that all that is done with a run finds it
in a core's second-level cache; and a pass over the matrices goes against the direction of the one before it, to begin
with what the last-level cache still holds. Making a view costs about as much as the work on a quarter of a run, so the
views are made once and serve in every step.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ._factors import Addends, Factor

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_ALIGNMENT = 64
_RUN = 1 << 17
"""Elements to take at once, 0.5 MiB in float32. (Rank 1, 24 MiB of matrices, the passes alone: 5.1 ms with a quarter
of it, 4.4 with half of it, 4.2 with this, 4.5 with twice of it, 4.7 with four times.)"""
OUTER = 8
"""Up to this rank, a sum of outer products is faster than one matrix product. (M of 4096 x 1024, rank 2: 0.5 and 2.9
ms.)"""


class OnHost:
    """See ``Products``."""

    def __init__(self, m: Tensor, rank: int) -> None:
        self.m = m
        _, self._rows, self._cols = m.shape
        self._step = run_length(self._rows, self._cols)
        self._runs = [one.split(self._step) for one in m.unbind()]
        self._others: list[tuple[int, Sequence[Tensor]] | None] = [None] * len(m)
        self._rank = rank
        self._subtract, self._store = (_subtract, _store) if rank <= OUTER else (_subtract_at_once, _store_at_once)
        self.left, self.right = self._left(), self._right()

    def averaged(self, *, left: bool) -> Factor:
        return self._left() if left else self._right()

    def multiply_right(self, q: Tensor, addends: Addends | None = None) -> None:
        factors = [_aligned(one[0] if self._rank == 1 else one) for one in q]
        for i in reversed(range(len(self.m))):
            for run, place in zip(self._sums(i, addends), self.left.runs[i], strict=True):
                if self._rank == 1:
                    torch.mv(run, factors[i], out=place)
                else:
                    torch.mm(factors[i], run.T, out=place)

    def multiply_left(self, p: Tensor, addends: Addends | None = None) -> None:
        if p is not self.left.values:
            self.left.values.copy_(p)  # aligned there, and its views are made
        totals = self.right.values.zero_()
        for i, total in enumerate(totals[:, 0] if self._rank == 1 else totals):
            for run, factor in zip(self._sums(i, addends), self.left.runs[i], strict=True):
                if self._rank == 1:
                    total.addmv_(run.T, factor)
                else:
                    total.addmm_(factor, run)

    def parts(self) -> Sequence[slice]:
        return [slice(i, i + 1) for i in reversed(range(len(self.m)))]

    def subtract(self, part: slice) -> None:
        for runs, columns, rows in zip(self._runs[part], self.left.terms[part], self.right.terms[part], strict=True):
            for run, terms in zip(runs, columns, strict=True):
                self._subtract(run, terms, rows, run)

    def store(self, part: slice, left: Factor, right: Factor) -> None:
        for runs, columns, rows in zip(self._runs[part], left.terms[part], right.terms[part], strict=True):
            for run, terms in zip(runs, columns, strict=True):
                self._store(terms, rows, run)

    def exchange(self, i: int, left: Factor, right: Factor, error: Tensor) -> bool:
        own, mean = self.right.terms[i], right.terms[i]
        runs = zip(self._runs[i], self._other(i, error, keep=True), self.left.terms[i], left.terms[i], strict=True)
        for run, rest, contributed, result in runs:
            self._subtract(run, contributed, own, rest)
            self._store(result, mean, run)
        return False

    def _sums(self, i: int, addends: Addends | None) -> Iterator[Tensor]:
        """The runs of the i-th matrix after adding to them, each at an aligned address.

        MKL's sums depend on the address modulo 64 bytes (seen), and so would the state on a parameter's place in its
        bucket. What does not lie at an aligned address is copied, a run at a time, never as a whole.
        """
        other = None if addends is None else addends.tensors[i]
        runs = self._runs[i] if addends is None or other is None else self._added(i, other, addends.scale)
        room: Tensor | None = None
        for run in runs:
            if run.data_ptr() % _ALIGNMENT:
                room = torch.empty_like(run) if room is None else room
                yield room[: len(run)].copy_(run)
            else:
                yield run

    def _added(self, i: int, other: Tensor, scale: float) -> Iterator[Tensor]:
        for run, more in zip(self._runs[i], self._other(i, other), strict=True):
            yield run.add_(more, alpha=scale)

    def _other(self, i: int, tensor: Tensor, *, keep: bool = False) -> Sequence[Tensor]:
        """The runs of a tensor like the i-th matrix.

        What ``exchange`` writes to is remembered, for it will be the next step's addend. No other tensor's memory may
        be held here.
        """
        kept = self._others[i]
        if kept is not None and kept[0] == tensor.data_ptr():
            return kept[1]
        runs: Sequence[Tensor] = tensor.view(self._rows, self._cols).split(self._step)
        self._others[i] = (tensor.data_ptr(), runs) if keep else None
        return runs

    def _left(self) -> Factor:
        values = self._aligned_factors(self._rows)
        runs = [one.split(self._step, 1) for one in values]
        terms = [[_vectors(run.unsqueeze(2), run.T) for run in matrix] for matrix in runs]
        return Factor(values, [[run[0] for run in one] for one in runs] if self._rank == 1 else runs, terms)

    def _right(self) -> Factor:
        values = self._aligned_factors(self._cols)
        return Factor(values, terms=[_vectors(one.unsqueeze(1), one) for one in values])

    def _aligned_factors(self, length: int) -> Tensor:
        """(batch, rank, length), each matrix's beginning at an aligned address."""
        spacing = -(-self._rank * length // 16) * 16
        memory = self.m.new_empty(len(self.m) * spacing)
        return memory.as_strided((len(self.m), self._rank, length), (spacing, length, 1))


def run_length(rows: int, cols: int) -> int:
    """How many of a matrix's rows to take at once."""
    step = min(max(_RUN // cols, 1), rows)
    return step - step % 16 if step > 16 else step  # then all runs are aligned if the first is


def _vectors(each: Tensor, whole: Tensor) -> Sequence[Tensor]:
    return list(each) if len(each) <= OUTER else [whole]


def _subtract(matrix: Tensor, columns: Sequence[Tensor], rows: Sequence[Tensor], out: Tensor) -> None:
    for column, row in zip(columns, rows, strict=True):
        torch.addcmul(matrix, column, row, value=-1, out=out)
        matrix = out


def _store(columns: Sequence[Tensor], rows: Sequence[Tensor], out: Tensor) -> None:
    """Products are rounded before they are added, as in the compiled pass: ranks with and without it agree."""
    torch.mul(columns[0], rows[0], out=out)
    if len(columns) > 1:
        term = torch.empty_like(out)
        for column, row in zip(columns[1:], rows[1:], strict=True):
            out.add_(torch.mul(column, row, out=term))


def _subtract_at_once(matrix: Tensor, columns: Sequence[Tensor], rows: Sequence[Tensor], out: Tensor) -> None:
    if out.data_ptr() % _ALIGNMENT:  # a product's bits depend on where it is written, too
        out.copy_(torch.addmm(matrix, columns[0], rows[0], alpha=-1))
    else:
        torch.addmm(matrix, columns[0], rows[0], alpha=-1, out=out)


def _store_at_once(columns: Sequence[Tensor], rows: Sequence[Tensor], out: Tensor) -> None:
    if out.data_ptr() % _ALIGNMENT:
        out.copy_(torch.mm(columns[0], rows[0]))
    else:
        torch.mm(columns[0], rows[0], out=out)


def _aligned(factor: Tensor) -> Tensor:
    return factor.clone() if factor.data_ptr() % _ALIGNMENT else factor
