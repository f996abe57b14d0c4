"""The hooks that step a sharded optimizer in backward."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import attrs

import commhub

from ._order import Order, as_comm_hook, order_of

if TYPE_CHECKING:
    from torch.distributed.optim import ZeroRedundancyOptimizer
    from torch.nn.parallel import DistributedDataParallel

    from ._order import CommHook


def hook_with_zero_step(
    hook: CommHook,
    ddp: DistributedDataParallel,  # noqa: ARG001 - PyTorch's signature; the model is found by its buckets
    zero: ZeroRedundancyOptimizer,
    shard_buckets: bool = False,  # noqa: ARG001 - each parameter has one owner, whatever its bucket
) -> CommHook:
    """The hook with the optimizer's step for all buckets once the last one's gradients are there.

    commhub's ``zero_overlap(mode=stepwise)``. ``zero.step()`` stays in the loop, and the first step updates.

    Args:
        hook: one of this package.
        ddp: the model.
        zero: its ``ZeroRedundancyOptimizer``, made without ``overlap_with_ddp=True``.
        shard_buckets: makes no difference: a parameter's owner is the one that ``zero`` has chosen.

    Raises:
        HookOptionError: if the hook is not one of this package.
        RegistrationError: if ``zero`` was made with ``overlap_with_ddp=True``.
    """
    return _with_step(hook, zero, "stepwise")


def hook_with_zero_step_interleaved(
    hook: CommHook,
    ddp: DistributedDataParallel,  # noqa: ARG001 - as above
    zero: ZeroRedundancyOptimizer,
    shard_buckets: bool = False,  # noqa: ARG001 - as above
) -> CommHook:
    """The hook with the optimizer's step for each bucket as soon as it is reduced; else as ``hook_with_zero_step``."""
    return _with_step(hook, zero, "interleaved")


def _with_step(hook: CommHook, zero: Any, mode: str) -> CommHook:
    inner = order_of(hook)
    if inner is None:
        raise commhub.HookOptionError(f"{getattr(hook, '__name__', hook)!r} is no hook of commhub_compat. Give one.")
    if getattr(zero, "_overlap_with_ddp", False):
        raise commhub.RegistrationError(
            "this ZeroRedundancyOptimizer was made with overlap_with_ddp=True. Leave that out: it has its parameters "
            "from the start here, and the first step updates them."
        )
    held = weakref.ref(zero)  # the reducer keeps the function, and Python sees no circle that goes through C++

    def order(state: Any) -> Order:
        made, optimizer = inner(state), held()
        if optimizer is None:
            raise commhub.RegistrationError("the optimizer that this hook was made for is gone.")
        options = {"inner": made.text, "mode": mode}
        return attrs.evolve(made, hook="zero_overlap", options=options, optimizer=optimizer)

    order.__name__ = order.__qualname__ = f"{hook.__name__}_with_zero_step"
    order.__doc__ = hook.__doc__
    return as_comm_hook(order)
