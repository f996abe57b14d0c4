"""Parameters' pieces in the parts of a bucket that is scattered: the same columns of each part."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from commhub.protocol._bucket import Bucket


def columns_of(bucket: Bucket) -> list[slice]:
    """For each parameter, where its pieces lie in ``bucket.parts``, and in ``bucket.shard``."""
    p = bucket.world_size
    return [slice(span.offset, span.offset + span.numel // p) for span in bucket.spans]


def put_columns(shard: Tensor, columns: Sequence[slice], values: Tensor) -> None:
    """Write ``values`` (1-D), one after another, into these columns."""
    for where, its in zip(columns, values.split([c.stop - c.start for c in columns]), strict=True):
        shard[where] = its
