"""Which of a bucket's parameters any rank has used: flags that travel with the gradients."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from commhub import AllReduce

if TYPE_CHECKING:
    from collections.abc import Generator

    from commhub import Bucket, Exchange


def reduce_with_flags(exchange: Exchange, bucket: Bucket) -> Generator[Any, Any, tuple[bool, ...]]:
    """Drive ``exchange``, sending the bucket's ``used`` flags along with what it asks for first.

    Returns:
        Per parameter, whether the backward of any rank reached it.
    """
    mine = torch.tensor(bucket.used, dtype=torch.int32, device=bucket.flat.device)
    flags = AllReduce(mine, op="sum")
    counts: Any = None
    answer: Any = None
    try:
        while True:
            try:
                request = exchange.send(answer)
            except StopIteration:
                break
            if counts is not None:
                answer = yield request
            elif isinstance(request, tuple):
                *several, counts = yield (*request, flags)
                answer = tuple(several)
            else:
                answer, counts = yield (request, flags)
    finally:
        exchange.close()
    if counts is None:
        counts = yield flags
    return tuple(count > 0 for count in counts.tolist())
