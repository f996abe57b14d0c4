"""The plain average of a bucket, or of this rank's part of it, some parameters cast for the way and some not."""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs
import torch
from torch import Tensor

from commhub.protocol._collectives import AllReduce, ReduceScatter

from ._columns import columns_of, put_columns
from ._per_bucket import PerBucket

if TYPE_CHECKING:
    from collections.abc import Container, Sequence

    from commhub.protocol._bucket import Bucket
    from commhub.protocol._hook import Exchange


@attrs.frozen(eq=False)
class _Message:
    """Some of a bucket's parameters, by place, and memory for them one after another."""

    places: Sequence[int]
    memory: Tensor
    wire: torch.dtype | None


class CastAllReduce:
    """Averages buckets in place, cast to a narrower dtype for the way, except for some parameters.

    Args:
        wire: a floating dtype; the mean is taken before the cast.
        exact: names of parameters that travel as without this cast, in a message beside the other. Only a bucket that
            holds some of both kinds is copied, into memory that is kept.
    """

    def __init__(self, wire: torch.dtype, exact: Container[str] = ()) -> None:
        self._wire, self._exact = wire, exact
        self._messages = PerBucket(self._lay_out)

    def reduce(self, bucket: Bucket) -> Exchange:
        """One all-reduce, or two at once."""
        messages = self._messages[bucket]
        if len(messages) == 1:
            bucket.flat.copy_((yield AllReduce(bucket.flat, wire=messages[0].wire)))
            return
        for message in messages:
            torch.cat([bucket.segments[i] for i in message.places], out=message.memory)
        means = yield tuple(AllReduce(message.memory, wire=message.wire) for message in messages)
        for message, mean in zip(messages, means, strict=True):
            sizes = [bucket.segments[i].numel() for i in message.places]
            for i, its in zip(message.places, mean.split(sizes), strict=True):
                bucket.segments[i].copy_(its)

    def reduce_scatter(self, bucket: Bucket) -> Exchange:
        """One reduce-scatter, or two at once."""
        messages = self._messages[bucket]
        if len(messages) == 1:
            bucket.shard = yield ReduceScatter(bucket.flat, wire=messages[0].wire)
            return
        columns = columns_of(bucket)
        for message in messages:
            pieces = [bucket.parts[:, columns[i]] for i in message.places]
            torch.cat(pieces, dim=1, out=message.memory.view(bucket.world_size, -1))
        means = yield tuple(ReduceScatter(message.memory, wire=message.wire) for message in messages)
        assert bucket.shard is not None
        for message, mean in zip(messages, means, strict=True):
            put_columns(bucket.shard, [columns[i] for i in message.places], mean)

    def _lay_out(self, bucket: Bucket) -> list[_Message]:
        exact = [i for i, name in enumerate(bucket.names) if name in self._exact]
        cast = [i for i, name in enumerate(bucket.names) if name not in self._exact]
        kinds = [(places, wire) for places, wire in ((cast, self._wire), (exact, None)) if places]
        sizes = [sum(bucket.spans[i].numel for i in places) if len(kinds) > 1 else 0 for places, _ in kinds]
        return [
            _Message(places, bucket.flat.new_empty(size), wire)
            for (places, wire), size in zip(kinds, sizes, strict=True)
        ]
