"""Which of a bucket's parameters any rank has used: flags that travel with the gradients."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from commhub import AllReduce, relay

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence

    from torch import Tensor

    from commhub import Bucket, Collective, Exchange


def reduce_with_flags(exchange: Exchange, bucket: Bucket) -> Generator[Any, Any, tuple[bool, ...]]:
    """Drive ``exchange``, sending the bucket's ``used`` flags along with what it asks for first.

    Returns:
        Per parameter, whether the backward of any rank reached it.
    """
    mine = torch.tensor(bucket.used, dtype=torch.int32, device=bucket.flat.device)
    flags = AllReduce(mine, op="sum")
    counts: Any = None

    def stage(asked: tuple[Collective, ...]) -> Generator[Any, Any, Sequence[Tensor]]:
        nonlocal counts
        results: Sequence[Tensor]
        if counts is None:
            *results, counts = yield (*asked, flags)
        else:
            results = yield asked
        return results

    yield from relay(exchange, stage)
    if counts is None:
        counts = yield flags
    return tuple(count > 0 for count in counts.tolist())
