"""Random factors that every rank draws alike, whatever the buckets, without touching a global generator."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ._layout import Matrix

_STRIDE = 0x9E3779B97F4A7C15
"""Between the seeds of successive steps, so that no two have more bits in common than chance (Knuth's multiplier)."""


class Source:
    """Tensors that depend on ``seed``, a parameter's name, a purpose and a step, and on nothing else."""

    def __init__(self, seed: int, device: torch.device) -> None:
        self._seed = seed
        self._device = device
        self._generator = torch.Generator(device)
        self._firsts: dict[tuple[str, str], int] = {}

    def factor(self, matrix: Matrix, dtype: torch.dtype, step: int | None = None) -> Tensor:
        """A right factor, transposed: (rank, cols), standard normal, as the paper starts."""
        empty = torch.empty(matrix.rank, matrix.cols, dtype=dtype, device=self._device)
        return empty.normal_(generator=self._seeded("q", matrix.name, step))

    def directions(self, matrices: Sequence[Matrix], side: str, like: Tensor, step: int) -> Tensor:
        """Directions of no meaning for some matrices' factors ``"p"`` or ``"q"``, between -1 and 1, like ``like``.

        ``like`` is (batch, rank, n), transposed as all factors are.
        """
        made = torch.empty_like(like, memory_format=torch.contiguous_format)
        for one, matrix in zip(made.unbind(), matrices, strict=True):
            first = self._firsts.get((side, matrix.name))
            if first is None:
                first = self._firsts[side, matrix.name] = self._seed_of("directions", side, matrix.name)
            one.uniform_(-1, 1, generator=self._generator.manual_seed((first + step * _STRIDE) % 2**63))
        return made

    def _seeded(self, *what: object) -> torch.Generator:
        return self._generator.manual_seed(self._seed_of(*what))

    def _seed_of(self, *what: object) -> int:
        digest = hashlib.blake2b(repr((self._seed, *what)).encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little") >> 1
