"""A buffer of shards as buckets: what the hook was prepared for, and the rest."""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs
import torch

from commhub.protocol._spans import lay_out

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Sequence

    from torch import Tensor

    from commhub.protocol._spans import Span

    from ._fsdp import Shard


@attrs.frozen
class _Piece:
    """A shard's gradient in a buffer: from where, and whether backward has reached it."""

    shard: Shard
    start: int
    used: bool

    def of(self, buffer: Tensor) -> Tensor:
        return buffer.narrow(0, self.start, self.shard.numel)


@attrs.frozen
class Cut:
    """Some shards' gradients as one bucket.

    Attributes:
        plain: whether the hook was not prepared for them.
        spans: where each lies in ``take``'s result.
    """

    plain: bool
    _pieces: tuple[_Piece, ...]
    spans: tuple[Span, ...]

    @classmethod
    def of(cls, pieces: Sequence[_Piece], plain: bool) -> Cut:
        """The bucket of these pieces, in their order."""
        spans = lay_out([p.shard.name for p in pieces], [p.shard.local for p in pieces])
        return cls(plain, tuple(pieces), spans)

    @property
    def used(self) -> tuple[bool, ...]:
        """For each shard, whether backward has reached it."""
        return tuple(piece.used for piece in self._pieces)

    @property
    def parameters(self) -> list[Tensor]:
        """The shards themselves."""
        return [piece.shard.local for piece in self._pieces]

    def take(self, buffer: Tensor) -> Tensor:
        """The gradients one after another; a view of the buffer where nothing lies between them."""
        first, last = self._pieces[0], self._pieces[-1]
        length = sum(piece.shard.numel for piece in self._pieces)
        if last.start + last.shard.numel - first.start == length:
            return buffer.narrow(0, first.start, length)
        return torch.cat([piece.of(buffer) for piece in self._pieces])

    def put_back(self, flat: Tensor, buffer: Tensor) -> None:
        """Leave what has become of them where it is looked for."""
        if flat.untyped_storage().data_ptr() != buffer.untyped_storage().data_ptr():
            for piece, result in zip(self._pieces, flat.split([p.shard.numel for p in self._pieces]), strict=True):
                piece.of(buffer).copy_(result)


def cut(parts: Sequence[tuple[Shard, bool]], prepared: Collection[str]) -> Iterator[Cut]:
    """The buckets of a buffer; padding is in none of them, nor a shard without elements.

    Args:
        parts: the shards in the buffer, in order, and for each whether backward has reached it.
        prepared: names of those that the hook was prepared for.
    """
    pieces, start = [], 0
    for shard, used in parts:
        pieces.append(_Piece(shard, start, used))
        start += shard.padded
    real = [piece for piece in pieces if piece.shard.numel]
    for plain in (False, True):
        chosen = [piece for piece in real if (piece.shard.name not in prepared) == plain]
        if chosen:
            yield Cut.of(chosen, plain)
