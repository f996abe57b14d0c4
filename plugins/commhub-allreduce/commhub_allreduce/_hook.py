"""The plain average."""

from __future__ import annotations

import attrs

from commhub import AllReduce, Bucket, Exchange, ReduceScatter


@attrs.frozen
class Allreduce:
    """Average gradients in their own dtype: what DDP does without a hook, bit for bit."""

    def reduce(self, bucket: Bucket) -> Exchange:
        """One all-reduce of ``bucket.flat`` (1-D, any dtype)."""
        bucket.flat.copy_((yield AllReduce(bucket.flat)))

    def reduce_scatter(self, bucket: Bucket) -> Exchange:
        """One reduce-scatter of ``bucket.flat``."""
        bucket.shard = yield ReduceScatter(bucket.flat)
