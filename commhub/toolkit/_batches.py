"""Many ranks' small shares, worked on together: a few operations on some shares at a time instead of a few on each.

Among a thousand ranks a share is a row or two, and each rank has a thousand of them. Large shares stay for themselves,
so that nothing is copied that does not fit a cache.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

_BATCH = 1 << 19
"""Bytes of a batch: what is made of it stays in a core's second-level cache."""


def batches(shares: int, size: int) -> Iterator[slice]:
    """All shares once, in order: as many at a time as are small together, at least one.

    Args:
        shares: how many there are.
        size: of what is made of each, in bytes.
    """
    step = max(_BATCH // max(size, 1), 1)
    for low in range(0, shares, step):
        yield slice(low, min(low + step, shares))


def add_in_order(out: Tensor, terms: Tensor, *, adding: bool) -> None:
    """Write the sum of ``terms`` (n, elements) into ``out`` (1-D), or add them: one after another, as a loop would."""
    if not adding:
        out.copy_(terms[0])
        terms = terms[1:]
    if len(terms) > 1 and out.device.type == "cpu":  # there, terms of one index are added in the order of the indices
        index = torch.zeros(len(terms), dtype=torch.int64)
        out.view(1, -1).index_add_(0, index, terms.contiguous())
        return
    for term in terms:
        out.add_(term)
