"""A bucket's gradients as one square matrix, and the two messages it takes; what a rule leaves dense goes along.

The parameters stand in the order of their names: a bucket that holds the same ones in another order of arrival, as
DDP's rebuilt buckets may, is the same matrix.
"""

from __future__ import annotations

import hashlib
from math import isqrt
from typing import TYPE_CHECKING

import attrs
import torch
from commhub_powersgd import Approximation, Matrix
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator

    from commhub_powersgd import Compiled

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
        places: in the bucket, of the parameters in the square that have elements, in the order of their names.
        names, sizes: of these parameters, in elements.
        dense: places of the parameters that are not in the square.
        matrix: the square, named after the parameters.
        m: the matrix itself, (1, side, side), in float32 or wider.
        first: the first message: P, then for each parameter in the square whether it is anything but zero, then
            every dense one.
        second: the second message: Q.
        p, q: the factors' places in the messages, (1, rank, side).
        compiled: the passes over matrices, if there are any.
        one: the square on the way to its mean; a step sets where it starts.
    """

    places: tuple[int, ...]
    names: tuple[str, ...]
    sizes: tuple[int, ...]
    dense: tuple[int, ...]
    matrix: Matrix
    m: Tensor
    first: Tensor
    second: Tensor
    p: Tensor
    q: Tensor
    compiled: Compiled | None
    one: Approximation = attrs.field(init=False)

    @one.default
    def _one(self) -> Approximation:
        return Approximation(
            matrices=(self.matrix,), m=self.m, start=self.q, p=self.p, q=self.q, compiled=self.compiled
        )

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
        return self.first[self.p.numel() :][: len(self.sizes)]

    def sent(self, iterations: int) -> int:
        """Elements in all messages of so many power iterations."""
        return self.first.numel() + self.q.numel() + (iterations - 1) * (self.p.numel() + self.q.numel())

    def pack_dense(self, bucket: Bucket) -> None:
        """Copy what is not in the square into the first message."""
        for segment, place in self._dense(bucket):
            place.copy_(segment)

    def unpack_dense(self, bucket: Bucket) -> None:
        """Copy it back."""
        for segment, place in self._dense(bucket):
            segment.copy_(place)

    def _dense(self, bucket: Bucket) -> Iterator[tuple[Tensor, Tensor]]:
        segments = [bucket.segments[i] for i in self.dense]
        places = self.first[self.p.numel() + len(self.sizes) :].split([segment.numel() for segment in segments])
        return zip(segments, places, strict=True)

    def _split(self) -> tuple[Tensor, ...]:
        return tuple(self.m.view(-1).split([*self.sizes, self.m.numel() - sum(self.sizes)]))


def lay_out(
    bucket: Bucket,
    compressed: Collection[str],
    *,
    rank: int,
    min_compression_rate: float,
    compiled: Compiled | None = None,
) -> Square | None:
    """The square of the parameters in a bucket that are ``compressed``, or ``None`` where it is sent as it is.

    That is where the factors are not ``min_compression_rate`` times smaller than what is compressed.
    """
    sizes = {i: segment.numel() for i, segment in enumerate(bucket.segments) if bucket.names[i] in compressed}
    n = sum(sizes.values())
    side = side_of(n)
    rank = min(rank, side)
    if not 2 * side * rank * min_compression_rate < n:
        return None
    places = tuple(sorted(sizes, key=lambda i: bucket.names[i]))
    names = tuple(bucket.names[i] for i in places)
    dtype = torch.promote_types(bucket.flat.dtype, torch.float32)
    first = bucket.flat.new_empty(rank * side + len(places) + bucket.flat.numel() - n, dtype=dtype)
    second = bucket.flat.new_empty(rank * side, dtype=dtype)
    return Square(
        places=places,
        names=names,
        sizes=tuple(sizes[i] for i in places),
        dense=tuple(i for i in range(len(bucket.names)) if i not in sizes),
        matrix=Matrix(label(names), side, side, rank),
        m=bucket.flat.new_empty(1, side, side, dtype=dtype),
        first=first,
        second=second,
        p=first[: rank * side].view(1, rank, side),
        q=second.view(1, rank, side),
        compiled=compiled,
    )
