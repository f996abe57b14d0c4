"""The plain average of a bucket, some parameters of it cast for the way and some not."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ._collectives import AllReduce

if TYPE_CHECKING:
    from collections.abc import Container

    from ._bucket import Bucket
    from ._protocols import Exchange


def averaged(bucket: Bucket, *, wire: torch.dtype, exact: Container[str] = ()) -> Exchange:
    """Average a bucket's gradients in place, cast to ``wire`` for the way: ``yield from`` it in ``reduce``.

    Args:
        bucket: to be averaged.
        wire: a narrower floating dtype; the mean is taken before the cast.
        exact: names of parameters that travel in their own dtype, in a message beside the other. Only a bucket that
            holds some of both is copied for it.
    """
    apart = [name in exact for name in bucket.names]
    if all(apart) or not any(apart):
        bucket.flat.copy_((yield AllReduce(bucket.flat, wire=None if apart[0] else wire)))
        return
    cast, own = ([s for s, its in zip(bucket.segments, apart, strict=True) if its == kind] for kind in (False, True))
    means = yield (AllReduce(torch.cat(cast), wire=wire), AllReduce(torch.cat(own)))
    for segments, mean in zip((cast, own), means, strict=True):
        for segment, its in zip(segments, mean.split([segment.numel() for segment in segments]), strict=True):
            segment.copy_(its)
