"""A bucket's gradients as one square matrix, and the two messages it takes.

The parameters stand in the order of their names: a bucket that holds the same ones in another order of arrival, as
DDP's rebuilt buckets may, is the same matrix.
"""

from __future__ import annotations

import hashlib
from math import isqrt
from typing import TYPE_CHECKING

import attrs
import torch
from commhub_powersgd import Matrix
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Iterable

    from commhub import Bucket


def side_of(numel: int) -> int:
    """The side of the smallest square that holds ``numel`` elements: ceil(sqrt(numel))."""
    return isqrt(numel - 1) + 1 if numel else 0


def label(names: Iterable[str]) -> str:
    """A short name for a set of parameters: 16 hexadecimal digits."""
    return hashlib.blake2b("\n".join(sorted(names)).encode(), digest_size=8).hexdigest()


@attrs.frozen(eq=False, kw_only=True)
class Square:
    """Where one bucket's gradients lie in their square. Kept between steps, with its memory.

    Attributes:
        places: in the bucket, of the parameters that have elements, in the order of their names.
        names, sizes: of these parameters, in elements.
        matrix: the square, named after the parameters.
        m: the matrix itself, (1, side, side), in float32 or wider.
        first: the first message: P, then for each parameter whether it is anything but zero.
        second: the second message: Q.
        p, q: the factors' places in the messages, (1, rank, side).
    """

    places: tuple[int, ...]
    names: tuple[str, ...]
    sizes: tuple[int, ...]
    matrix: Matrix
    m: Tensor
    first: Tensor
    second: Tensor
    p: Tensor
    q: Tensor

    @property
    def pieces(self) -> tuple[Tensor, ...]:
        """The parameters' elements in the square, 1-D views."""
        return self._split()[: len(self.sizes)]

    @property
    def padding(self) -> Tensor:
        """The square's last elements, which are no parameter's."""
        return self._split()[-1]

    @property
    def alive(self) -> Tensor:
        """In the first message, one number for each parameter: not zero where a rank has something to send."""
        return self.first[self.p.numel() :]

    def sent(self, iterations: int) -> int:
        """Elements in all messages of so many power iterations."""
        return iterations * (self.p.numel() + self.q.numel()) + len(self.sizes)

    def _split(self) -> tuple[Tensor, ...]:
        return tuple(self.m.view(-1).split([*self.sizes, self.m.numel() - sum(self.sizes)]))


def lay_out(bucket: Bucket, *, rank: int, min_compression_rate: float) -> Square | None:
    """The square of a bucket, or ``None`` where it is sent as it is.

    That is where gradients are not real, and where the factors are not ``min_compression_rate`` times smaller.
    """
    n = bucket.flat.numel()
    side = side_of(n)
    rank = min(rank, side)
    if not bucket.flat.is_floating_point() or not 2 * side * rank * min_compression_rate < n:
        return None
    sizes = {i: segment.numel() for i, segment in enumerate(bucket.segments) if segment.numel()}
    places = tuple(sorted(sizes, key=lambda i: bucket.names[i]))
    names = tuple(bucket.names[i] for i in places)
    dtype = torch.promote_types(bucket.flat.dtype, torch.float32)
    first = bucket.flat.new_empty(rank * side + len(places), dtype=dtype)
    second = bucket.flat.new_empty(rank * side, dtype=dtype)
    return Square(
        places=places,
        names=names,
        sizes=tuple(sizes[i] for i in places),
        matrix=Matrix(label(names), side, side, rank),
        m=bucket.flat.new_empty(1, side, side, dtype=dtype),
        first=first,
        second=second,
        p=first[: rank * side].view(1, rank, side),
        q=second.view(1, rank, side),
    )
