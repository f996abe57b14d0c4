"""Averaging in float16."""

from __future__ import annotations

import attrs
import torch

from commhub import AllReduce, Bucket, Exchange


@attrs.frozen
class Fp16:
    """Average gradients in float16: half the bytes of float32, 11 significant bits, at most 65504.

    The mean is taken before the cast, so that it overflows only where a rank's share of it does.
    """

    def reduce(self, bucket: Bucket) -> Exchange:
        """One all-reduce of ``bucket.flat`` (1-D, any dtype), cast for the way; 16-bit gradients travel as they are."""
        bucket.flat.copy_((yield AllReduce(bucket.flat, wire=torch.float16)))
