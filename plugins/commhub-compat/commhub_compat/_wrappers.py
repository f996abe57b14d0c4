"""The two wrappers that have any hook's payload travel in 16 bits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs
import torch

from ._order import Order, as_comm_hook, order_of

if TYPE_CHECKING:
    from torch import Tensor

    from ._order import CommHook

_CASTS = ("fp16", "bf16")
"""Hooks that are a cast themselves: the one inside decides what travels."""


def fp16_compress_wrapper(hook: CommHook) -> CommHook:
    """The hook with its payload in float16: commhub's ``wire="fp16"``.

    A function of the user's own is given the bucket in float16, as PyTorch does, and runs without commhub.
    """
    return _wrapped(hook, "fp16", torch.float16)


def bf16_compress_wrapper(hook: CommHook) -> CommHook:
    """The hook with its payload in bfloat16, on every backend: commhub's ``wire="bf16"``; else as in float16."""
    return _wrapped(hook, "bf16", torch.bfloat16)


def _wrapped(hook: CommHook, wire: str, dtype: torch.dtype) -> CommHook:
    inner = order_of(hook)
    if inner is None:
        return _cast_around(hook, dtype)

    def order(state: Any) -> Order:
        made = inner(state)
        return made if made.wire is not None or made.hook in _CASTS else attrs.evolve(made, wire=wire)

    order.__name__ = order.__qualname__ = f"{wire}_compressed_{hook.__name__}"
    order.__doc__ = hook.__doc__
    return as_comm_hook(order)


def _cast_around(hook: CommHook, dtype: torch.dtype) -> CommHook:
    def compressed(state: Any, bucket: Any) -> torch.futures.Future[Tensor]:
        whole: Tensor = bucket.buffer()
        bucket.set_buffer(whole.to(dtype))

        def back(future: torch.futures.Future[Any]) -> Tensor:
            value = future.value()
            whole.copy_(value[0] if isinstance(value, list) else value)
            return whole

        return hook(state, bucket).then(back)

    compressed.__annotations__ = {}  # as text they would not be what PyTorch compares them with
    return compressed
