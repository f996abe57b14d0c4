"""The hooks whose state is a process group, or nothing."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

from ._order import Order, as_comm_hook, group_of


@as_comm_hook
def allreduce_hook(process_group: Any) -> Order:
    """The plain average, commhub's ``allreduce``: for ``model.register_comm_hook(process_group, allreduce_hook)``."""
    return Order(hook="allreduce", process_group=group_of(process_group))


@partial(as_comm_hook, alone=default_hooks.fp16_compress_hook)
def fp16_compress_hook(process_group: Any) -> Order:
    """The average in float16, commhub's ``fp16``. The mean is taken before the cast, and does not overflow."""
    return Order(hook="fp16", process_group=group_of(process_group))


def _bf16_compress_hook(process_group: Any) -> Order:
    """The average in bfloat16, commhub's ``bf16``, on every backend."""
    return Order(hook="bf16", process_group=group_of(process_group))


_bf16_compress_hook.__qualname__ = "bf16_compress_hook"
# PyTorch refuses a function with the __name__ that its own has on all backends but NCCL.
bf16_compress_hook = as_comm_hook(_bf16_compress_hook, "bf16_compress", alone=default_hooks.bf16_compress_hook)


@as_comm_hook
def quantization_pertensor_hook(process_group: Any) -> Order:
    """The average in 8-bit codes, commhub's ``quantize_per_tensor``: one scale for each parameter."""
    return Order(hook="quantize_per_tensor", process_group=group_of(process_group))


@as_comm_hook
def quantization_perchannel_hook(process_group: Any) -> Order:
    """The average in 8-bit codes, commhub's ``quantize_per_channel``: a scale for every 512 elements."""
    return Order(hook="quantize_per_channel", options={"group_size": 512}, process_group=group_of(process_group))


@as_comm_hook
def noop_hook(_state: Any) -> Order:
    """Nothing is sent, commhub's ``noop``: shows what free communication would give. The state is not looked at."""
    return Order(hook="noop")
