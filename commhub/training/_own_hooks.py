"""The hooks that the core itself needs: plain means and sums."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from commhub.protocol._collectives import AllReduce

if TYPE_CHECKING:
    from commhub.protocol._bucket import Bucket
    from commhub.protocol._hook import Exchange


class PlainMean:
    """The average and nothing else: what a model does whose hook was removed."""

    def reduce(self, bucket: Bucket) -> Exchange:
        """Average ``bucket.flat`` over all ranks."""
        bucket.flat.copy_((yield AllReduce(bucket.flat)))


class WholeMean:
    """The average in the bucket's own dtype, whatever the registration's wire is."""

    def reduce(self, bucket: Bucket) -> Exchange:
        """Average ``bucket.flat``."""
        bucket.flat.copy_((yield AllReduce(bucket.flat, wire=torch.float64)))


class Sum:
    """Adds up over the ranks."""

    def reduce(self, bucket: Bucket) -> Exchange:
        """Add up ``bucket.flat`` over the bucket's group."""
        bucket.flat.copy_((yield AllReduce(bucket.flat, op="sum", group=bucket.group)))
