"""What cannot be attached, or attached to, and why: each function raises a CommhubError where it is so."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Final

import torch.distributed as dist

import commhub
from commhub import HookOptionError, RegistrationError

OURS: Final = ("optimizer", "scaler")
"""Arguments of ``commhub.register`` that the accelerator knows better."""

_NOT_DDP: Final = {
    "FSDP": "shards the model with FSDP, which has no slot for DDP's hooks",
    "DEEPSPEED": "hands the model to DeepSpeed, which averages gradients itself",
    "MEGATRON_LM": "hands the model to Megatron-LM, which averages gradients itself",
    "XLA": "averages gradients in XLA's own way, without DDP",
    "TP": "shards the model by tensor parallelism, without DDP",
}


def refuse_options(options: dict[str, Any]) -> None:
    """Raise HookOptionError for what the adapter passes on by itself."""
    for name in OURS:
        if name in options:
            raise HookOptionError(f"{name}= is not given here: every hook gets what is prepared with its model.")


def checked_schedule(given: object) -> dict[int, str]:
    """The hooks by step; raise for what is no dict, and for a hook that cannot be had."""
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise HookOptionError(f"schedule is {given!r}; give a dict of hooks by step, or None.")
    for hook in given.values():
        commhub.checked(hook)
    return dict(given)


def refuse_accelerator(accelerator: Any) -> None:
    """Raise for an accelerator whose models run no hooks, or which is not as it was made any more."""
    kind = accelerator.distributed_type.value
    reason = _NOT_DDP.get(kind)
    if reason is None and getattr(accelerator.parallelism_config, "tp_enabled", False):
        reason = _NOT_DDP["TP"]
    if reason is not None:
        raise RegistrationError(
            f"this accelerator {reason}. commhub serves models in DistributedDataParallel: configure Accelerate for "
            "MULTI_GPU or MULTI_CPU."
        )
    _refuse_ranks_apart(accelerator)
    if accelerator._models:
        raise RegistrationError(
            f"this accelerator has prepared {len(accelerator._models)} model(s) already, which would train on without "
            "the hook. Call attach() before prepare(), and before evaluating."
        )
    _refuse_other_hook(accelerator.ddp_handler)


def _refuse_ranks_apart(accelerator: Any) -> None:
    """Raise where several processes were started that Accelerate takes for one each, as it does without a GPU."""
    group = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    told = os.environ.get("WORLD_SIZE", "1")
    started = max(group, int(told) if told.isdigit() else 1)
    if accelerator.num_processes == 1 and started > 1:
        raise RegistrationError(
            f"{started} processes were started, and Accelerate takes each of them for the only one: every rank would "
            "train alone. Without a GPU it wants to be told: Accelerator(cpu=True), TrainingArguments(use_cpu=True), "
            "or accelerate launch --cpu."
        )


def _refuse_other_hook(handler: Any) -> None:
    """Raise if the user's ``DistributedDataParallelKwargs`` name a hook, also where Accelerate would ignore it."""
    for name in ("comm_hook", "comm_wrapper"):
        named = getattr(handler, name, None)
        named = getattr(named, "value", named)
        if named not in (None, "no"):
            raise RegistrationError(
                f"DistributedDataParallelKwargs has {name}={named!r}, and a model takes one hook. Leave it out there; "
                "wire='fp16' or 'bf16' of attach() does what a wrapper does."
            )


def unserved(accelerator: Any, given: Any, prepared: Any, *, evaluation: bool) -> None:
    """Raise for a model that was prepared for training on several ranks and is in no DDP model."""
    trains = not evaluation and any(p.requires_grad for p in prepared.parameters())
    if trains and accelerator.num_processes > 1:
        raise RegistrationError(
            f"Accelerate has put no DistributedDataParallel around {type(given).__name__}: every rank would train "
            "alone, with or without a hook. It does so where the same model was prepared for evaluation before "
            "(Trainer.evaluate() ahead of train(), for one). Evaluate afterwards, or prepare a fresh model."
        )
