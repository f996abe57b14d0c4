"""Whether all ranks' arithmetic gives the same bits: their processors and numbers of threads decide that."""

from __future__ import annotations

import ctypes
import hashlib
from typing import TYPE_CHECKING

import torch

from ._on_host import OUTER, OnHost
from ._orthogonal import orthogonalize, renew

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor

    from commhub import Setup

    Shape = tuple[int, int, int, torch.dtype]
    """Rows, columns and rank of a matrix, and the dtype that it is worked on in."""


def compare_bits(setup: Setup, name: str, shapes: Iterable[Shape]) -> None:
    """Have the ranks compare what they make of the same factors of matrices of these shapes, on the host.

    Averaged factors are equal everywhere; each rank orthogonalizes and multiplies them for itself. Sums of vectors and
    matrix products depend on the instruction set and on the number of threads.

    Args:
        setup: what ``prepare`` got.
        name: the hook's, for the error.
        shapes: of the matrices that are compressed.
    """
    if setup.device.type != "cpu":
        return
    kinds = sorted(set(shapes), key=str)
    threads = torch.get_num_threads()
    setup.agree(
        f"the bits of {name}'s factors",
        lambda: _bits(kinds),
        f"it computes with {torch.backends.cpu.get_cpu_capability()} and {threads} thread{'s' * (threads > 1)}. Set "
        "ATEN_CPU_CAPABILITY and OMP_NUM_THREADS alike on all ranks",
    )


def _bits(shapes: Iterable[Shape]) -> str:
    digest = hashlib.blake2b(digest_size=8)
    generator = torch.Generator().manual_seed(0)
    for rows, cols, rank, dtype in shapes:
        start = torch.empty(1, rank, cols, dtype=dtype).normal_(generator=generator)
        drawn = [torch.empty(1, rank, n, dtype=dtype).uniform_(-1, 1, generator=generator) for n in (rows, cols) * 2]
        left, right = (
            orthogonalize(factor, directions) for factor, directions in zip(drawn[:2], drawn[2:], strict=True)
        )
        made = [start, left, right, renew(drawn[1], drawn[3])]
        if rank > OUTER:  # up to there products are one element's at a time, and rounded alike everywhere
            whole = OnHost(torch.empty(1, rows, cols, dtype=dtype), rank)
            factors = whole.averaged(left=True), whole.averaged(left=False)
            for factor, values in zip(factors, (left, right), strict=True):
                factor.values.copy_(values)
            whole.store(slice(None), *factors)
            made.append(whole.m)
        for tensor in made:
            digest.update(_bytes(tensor))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> bytes:
    tensor = tensor.contiguous()
    return ctypes.string_at(tensor.data_ptr(), tensor.nbytes)
