"""The enumeration of PyTorch's hooks, and registering by it."""

from __future__ import annotations

from enum import Enum, member
from functools import partial
from typing import TYPE_CHECKING, Any

import commhub

from ._hooks import (
    allreduce_hook,
    bf16_compress_hook,
    fp16_compress_hook,
    noop_hook,
    quantization_perchannel_hook,
    quantization_pertensor_hook,
)
from ._order import Refused, order_of
from ._powersgd import PowerSGDState, batched_powerSGD_hook, powerSGD_hook

if TYPE_CHECKING:
    from ._order import CommHook


def _register(model: object, state: Any = None, *, comm_hook: CommHook) -> None:
    order = order_of(comm_hook)
    assert order is not None
    try:
        made = order(state)
    except Exception as error:
        commhub.register(model, Refused(error))
        raise
    made.register(model)


def _register_powersgd(
    model: object,
    state: Any = None,
    *,
    comm_hook: CommHook,
    matrix_approximation_rank: int,
    start_powerSGD_iter: int = 1000,  # noqa: N803 - PyTorch's name
) -> None:
    made = PowerSGDState(state, matrix_approximation_rank, start_powerSGD_iter)
    _register(model, made, comm_hook=comm_hook)


class DDPCommHookType(Enum):
    """PyTorch's names for its hooks. Calling a member's value registers it: ``.value(model=model, state=group)``.

    That is collective, as ``commhub.register`` is: the ranks are compared at once, and a hook that is there is
    replaced.
    """

    ALLREDUCE = member(partial(_register, comm_hook=allreduce_hook))
    FP16_COMPRESS = member(partial(_register, comm_hook=fp16_compress_hook))
    BF16_COMPRESS = member(partial(_register, comm_hook=bf16_compress_hook))
    QUANTIZE_PER_TENSOR = member(partial(_register, comm_hook=quantization_pertensor_hook))
    QUANTIZE_PER_CHANNEL = member(partial(_register, comm_hook=quantization_perchannel_hook))
    POWER_SGD = member(partial(_register_powersgd, comm_hook=powerSGD_hook, matrix_approximation_rank=1))
    POWER_SGD_RANK2 = member(partial(_register_powersgd, comm_hook=powerSGD_hook, matrix_approximation_rank=2))
    BATCHED_POWER_SGD = member(
        partial(_register_powersgd, comm_hook=batched_powerSGD_hook, matrix_approximation_rank=1)
    )
    BATCHED_POWER_SGD_RANK2 = member(
        partial(_register_powersgd, comm_hook=batched_powerSGD_hook, matrix_approximation_rank=2)
    )
    NOOP = member(partial(_register, comm_hook=noop_hook))


def register_ddp_comm_hook(comm_hook_type: DDPCommHookType, model: object, state: Any = None) -> None:
    """Register one of PyTorch's hooks, as commhub has it; collective.

    Args:
        comm_hook_type: which one.
        model: a DDP model, or what holds one.
        state: the process group to average over; ``None`` is the model's own.

    Raises:
        HookOptionError: if it is no member, or the state no process group.
        HookMismatchError, RegistrationError: as ``commhub.register``.
    """
    if not isinstance(comm_hook_type, DDPCommHookType):
        error = commhub.HookOptionError(f"comm_hook_type is {comm_hook_type!r}; give a member of DDPCommHookType.")
        commhub.register(model, Refused(error))
    comm_hook_type.value(model=model, state=state)
