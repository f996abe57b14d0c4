"""Products of one large matrix and a thin factor, as fast as memory allows, with bits that no layout changes.

All are batched: M is (batch, n, m), P and Q are transposed, (batch, rank, n) and (batch, rank, m). Measured on one
core of an EPYC, MKL, M of 4096 x 1024 at rank 2: Q with factors by column takes 22 ms, by row 0.4 ms; P Q^T as one
product 2.9 ms, as two outer products 0.5 ms.

At rank 1 all time goes to moving matrices. On the host each is taken in blocks of rows, so that all that is done with
a block finds it in a core's second-level cache; and a pass over the matrices goes against the direction of the one
before it, to begin with what the last-level cache still holds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs
import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    Factors = tuple[Tensor, Tensor]

_ALIGNMENT = 64
_BLOCK = 1 << 18
"""Elements to take at once, 1 MiB in float32. (Smaller ones stay in the cache better but cost calls; rank 1, bucket of
25 MiB: 9.1 ms with a quarter of it, 8.3 with half of it, 8.0 with this, 7.7 with twice of it; rank 2: 10.0, 9.3, 9.1
and 9.5.)"""
_OUTER = 8
"""Up to this rank, a sum of outer products is faster on the CPU than one matrix product."""


@attrs.frozen(eq=False)
class Addends:
    """What to add to matrices, in place, before they are multiplied: together these take one pass over memory.

    Attributes:
        tensors: one for each matrix, n m elements in memory order; ``None`` adds nothing.
        scale: what they are multiplied by.
    """

    tensors: Sequence[Tensor | None]
    scale: float = 1.0


def left_factor(matrix: Tensor, q: Tensor, addends: Addends | None = None) -> Tensor:
    """P = M Q. With ``addends``, M is the sum from then on."""
    if matrix.device.type != "cpu":
        return torch.bmm(q, _added(matrix, addends).mT)
    products = []
    for i in reversed(range(len(matrix))):
        factor, p = _aligned(q[i]), q.new_empty(q.shape[1], matrix.shape[1])
        for block, place in zip(_blocks(matrix[i], i, addends), p.split(_rows(*matrix[i].shape), 1), strict=True):
            torch.mm(factor, block.T, out=place)
        products.append(p)
    return _stacked(products[::-1])


def right_factor(matrix: Tensor, p: Tensor, addends: Addends | None = None) -> Tensor:
    """Q = M^T P. With ``addends``, M is the sum from then on."""
    if matrix.device.type != "cpu":
        return torch.bmm(p, _added(matrix, addends))
    products = []
    for i in range(len(matrix)):
        q = p.new_zeros(p.shape[1], matrix.shape[2])
        factors = _aligned(p[i]).split(_rows(*matrix[i].shape), 1)
        for block, factor in zip(_blocks(matrix[i], i, addends), factors, strict=True):
            q.addmm_(factor, block)
        products.append(q)
    return _stacked(products)


def subtract_product(matrix: Tensor, factors: Factors, out: Tensor) -> None:
    """``out`` = M - P Q^T; ``out`` may be M itself."""
    if matrix.device.type != "cpu":
        torch.baddbmm(matrix, factors[0].mT, factors[1], alpha=-1, out=out)
        return
    for one, p, q, place in zip(matrix, *factors, out, strict=True):
        for block, terms, rest in zip(_split(one), _terms(p, q), _split(place), strict=True):
            _subtract(block, terms, rest)


def store_product(factors: Factors, out: Tensor) -> None:
    """``out`` = P Q^T."""
    if out.device.type != "cpu":
        torch.bmm(factors[0].mT, factors[1], out=out)
        return
    for place, p, q in zip(out, *factors, strict=True):
        for block, terms in zip(_split(place), _terms(p, q), strict=True):
            _store(terms, block)


def exchange_product(matrix: Tensor, own: Factors, mean: Factors, error: Tensor) -> None:
    """``error`` = M - P Q^T with the factors ``own``, then M = P Q^T with those of ``mean``, in one pass.

    For one matrix on the host: M and ``error`` are (n, m), the factors (rank, n) and (rank, m).
    """
    blocks = zip(_split(matrix), _split(error), _terms(*own), _terms(*mean), strict=True)
    for block, rest, contributed, result in blocks:
        _subtract(block, contributed, rest)
        _store(result, block)


def _subtract(matrix: Tensor, terms: Sequence[Factors], out: Tensor) -> None:
    for column, row in terms:
        if len(row) == 1:
            torch.addcmul(matrix, column, row, value=-1, out=out)
        else:
            torch.addmm(matrix, column, row, alpha=-1, out=out)
        matrix = out


def _store(terms: Sequence[Factors], out: Tensor) -> None:
    first = True
    for column, row in terms:
        if len(row) > 1:
            torch.mm(column, row, out=out)
        elif first:
            torch.mul(column, row, out=out)
        else:
            out.addcmul_(column, row)
        first = False


def _terms(p: Tensor, q: Tensor) -> Sequence[Sequence[Factors]]:
    """For each block of rows of P Q^T, what is to be summed: (rows, 1) by (1, m) each, or one product for all."""
    step = _rows(p.shape[1], q.shape[1])
    if len(p) > _OUTER:
        return [((block, q),) for block in p.T.split(step)]
    rows = q.unsqueeze(1).unbind()
    columns = [column.split(step) for column in p.unsqueeze(2).unbind()]
    return [tuple(zip(block, rows, strict=True)) for block in zip(*columns, strict=True)]


def _split(matrix: Tensor) -> Sequence[Tensor]:
    blocks: Sequence[Tensor] = matrix.split(_rows(*matrix.shape))
    return blocks


def _rows(rows: int, cols: int) -> int:
    """How many of a matrix's rows to take at once."""
    step = min(max(_BLOCK // cols, 1), rows)
    return step - step % 16 if step > 16 else step  # then all blocks are aligned if the first is


def _blocks(matrix: Tensor, i: int, addends: Addends | None) -> Iterator[Tensor]:
    """Runs of rows of the i-th matrix (n, m), after adding to them, each at an aligned address.

    MKL's sums depend on the address modulo 64 bytes (seen), and so would the state on a parameter's place in its
    bucket. What does not lie at an aligned address is copied, a block at a time, never as a whole.
    """
    room: Tensor | None = None
    for block in _sums(matrix, i, addends):
        if block.data_ptr() % _ALIGNMENT:
            room = torch.empty_like(block) if room is None else room
            block = room[: len(block)].copy_(block)
        yield block


def _sums(matrix: Tensor, i: int, addends: Addends | None) -> Iterator[Tensor]:
    other = None if addends is None else addends.tensors[i]
    if addends is None or other is None:
        yield from _split(matrix)
        return
    for block, more in zip(_split(matrix), _split(other.view(matrix.shape)), strict=True):
        yield block.add_(more, alpha=addends.scale)


def _added(matrix: Tensor, addends: Addends | None) -> Tensor:
    if addends is not None:
        for one, other in zip(matrix, addends.tensors, strict=True):
            if other is not None:
                one.add_(other.view(one.shape), alpha=addends.scale)
    return matrix


def _stacked(products: list[Tensor]) -> Tensor:
    return products[0].unsqueeze(0) if len(products) == 1 else torch.stack(products)


def _aligned(factor: Tensor) -> Tensor:
    return factor.clone() if factor.data_ptr() % _ALIGNMENT else factor
