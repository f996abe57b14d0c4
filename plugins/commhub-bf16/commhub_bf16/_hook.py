"""Averaging in bfloat16."""

from __future__ import annotations

import attrs
import torch

from commhub import AllReduce, Bucket, Exchange


@attrs.frozen
class Bf16:
    """Average gradients in bfloat16: half the bytes of float32 and its range, 8 significant bits."""

    def reduce(self, bucket: Bucket) -> Exchange:
        """One all-reduce of ``bucket.flat`` (1-D, any dtype), cast for the way; 16-bit gradients travel as they are."""
        bucket.flat.copy_((yield AllReduce(bucket.flat, wire=torch.bfloat16)))
