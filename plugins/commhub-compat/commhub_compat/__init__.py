"""PyTorch's communication hooks under their own names, run by commhub.

A skin without an algorithm: what stands here has PyTorch's signatures, defaults and attribute names, and registers
commhub's hooks. Importing this package loads no torch; what it offers is loaded when it is first asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ._averagers import HierarchicalModelAverager, PeriodicModelAverager
    from ._foreign import foreign
    from ._hooks import (
        allreduce_hook,
        bf16_compress_hook,
        fp16_compress_hook,
        noop_hook,
        quantization_perchannel_hook,
        quantization_pertensor_hook,
    )
    from ._in_backward import _apply_optimizer_in_backward, _get_in_backward_optimizers
    from ._local_sgd import PostLocalSGDState, post_localSGD_hook
    from ._optimizer import PostLocalSGDOptimizer
    from ._powersgd import PowerSGDState, batched_powerSGD_hook, powerSGD_hook
    from ._types import DDPCommHookType, register_ddp_comm_hook
    from ._wrappers import bf16_compress_wrapper, fp16_compress_wrapper
    from ._zero import hook_with_zero_step, hook_with_zero_step_interleaved

__all__ = [
    "DDPCommHookType",
    "HierarchicalModelAverager",
    "PeriodicModelAverager",
    "PostLocalSGDOptimizer",
    "PostLocalSGDState",
    "PowerSGDState",
    "_apply_optimizer_in_backward",
    "_get_in_backward_optimizers",
    "allreduce_hook",
    "batched_powerSGD_hook",
    "bf16_compress_hook",
    "bf16_compress_wrapper",
    "foreign",
    "fp16_compress_hook",
    "fp16_compress_wrapper",
    "hook_with_zero_step",
    "hook_with_zero_step_interleaved",
    "noop_hook",
    "post_localSGD_hook",
    "powerSGD_hook",
    "quantization_perchannel_hook",
    "quantization_pertensor_hook",
    "register_ddp_comm_hook",
]

_HOMES = {
    "DDPCommHookType": "_types",
    "HierarchicalModelAverager": "_averagers",
    "PeriodicModelAverager": "_averagers",
    "PostLocalSGDOptimizer": "_optimizer",
    "PostLocalSGDState": "_local_sgd",
    "PowerSGDState": "_powersgd",
    "_apply_optimizer_in_backward": "_in_backward",
    "_get_in_backward_optimizers": "_in_backward",
    "allreduce_hook": "_hooks",
    "batched_powerSGD_hook": "_powersgd",
    "bf16_compress_hook": "_hooks",
    "bf16_compress_wrapper": "_wrappers",
    "foreign": "_foreign",
    "fp16_compress_hook": "_hooks",
    "fp16_compress_wrapper": "_wrappers",
    "hook_with_zero_step": "_zero",
    "hook_with_zero_step_interleaved": "_zero",
    "noop_hook": "_hooks",
    "post_localSGD_hook": "_local_sgd",
    "powerSGD_hook": "_powersgd",
    "quantization_perchannel_hook": "_hooks",
    "quantization_pertensor_hook": "_hooks",
    "register_ddp_comm_hook": "_types",
}


def __getattr__(name: str) -> object:
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
