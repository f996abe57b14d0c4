"""Random factors that every rank draws alike, whatever the buckets, without touching a global generator."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ._layout import Matrix


class Source:
    """Tensors that depend on ``seed``, a parameter's name, a purpose and a step, and on nothing else."""

    def __init__(self, seed: int, device: torch.device) -> None:
        self._seed = seed
        self._device = device
        self._generator = torch.Generator(device)

    def factor(self, matrix: Matrix, dtype: torch.dtype, step: int | None = None) -> Tensor:
        """A right factor, transposed: (rank, cols), standard normal, as the paper starts."""
        empty = torch.empty(matrix.rank, matrix.cols, dtype=dtype, device=self._device)
        return empty.normal_(generator=self._seeded("q", matrix.name, step))

    def directions(self, matrix: Matrix, side: str, dtype: torch.dtype, step: int) -> Tensor:
        """Directions of no meaning for the factor ``"p"`` or ``"q"``, transposed: (rank, n), between -1 and 1."""
        length = matrix.rows if side == "p" else matrix.cols
        empty = torch.empty(matrix.rank, length, dtype=dtype, device=self._device)
        return empty.uniform_(-1, 1, generator=self._seeded("directions", side, matrix.name, step))

    def _seeded(self, *what: object) -> torch.Generator:
        digest = hashlib.blake2b(repr((self._seed, *what)).encode(), digest_size=8).digest()
        return self._generator.manual_seed(int.from_bytes(digest, "little") >> 1)
