"""Products on a device: a few large operations, each over the whole batch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ._factors import Addends, Factor

if TYPE_CHECKING:
    from collections.abc import Sequence


class OnDevice:
    """See ``Products``."""

    def __init__(self, m: Tensor, rank: int) -> None:
        batch, rows, cols = m.shape
        self._m = m
        self.left, self.right = (Factor(m.new_empty(batch, rank, length)) for length in (rows, cols))

    def averaged(self, *, left: bool) -> Factor:
        return Factor(torch.empty_like((self.left if left else self.right).values))

    def multiply_right(self, q: Tensor, addends: Addends | None = None) -> None:
        self._add(addends)
        torch.bmm(q, self._m.mT, out=self.left.values)

    def multiply_left(self, p: Tensor, addends: Addends | None = None) -> None:
        if p is not self.left.values:
            self.left.values.copy_(p)
        self._add(addends)
        torch.bmm(p, self._m, out=self.right.values)

    def parts(self) -> Sequence[slice]:
        return [slice(0, len(self._m))]

    def subtract(self, part: slice) -> None:
        m = self._m[part]
        torch.baddbmm(m, self.left.values[part].mT, self.right.values[part], alpha=-1, out=m)

    def store(self, part: slice, left: Factor, right: Factor) -> None:
        torch.bmm(left.values[part].mT, right.values[part], out=self._m[part])

    def exchange(self, i: int, left: Factor, right: Factor, error: Tensor) -> bool:
        part = slice(i, i + 1)
        self.subtract(part)
        error.view(self._m.shape[1:]).copy_(self._m[i])
        self.store(part, left, right)
        return False

    def _add(self, addends: Addends | None) -> None:
        if addends is not None:
            for one, other in zip(self._m, addends.tensors, strict=True):
                if other is not None:
                    one.add_(other.view(one.shape), alpha=addends.scale)
