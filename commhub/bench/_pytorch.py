"""PyTorch's own hooks, to compare with: ``torch:fp16`` in a list of hooks. No torch where their names are read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from commhub._errors import HookOptionError

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch.nn.parallel import DistributedDataParallel

PREFIX = "torch:"
_NAMES = ("none", "allreduce", "fp16", "bf16", "powersgd")
_SHARE = {"none": 1.0, "allreduce": 1.0, "fp16": 0.5, "bf16": 0.5}
"""What they send of what a plain all-reduce of float32 does."""


def is_pytorchs(hook: str) -> bool:
    """Whether a hook string names one of PyTorch's."""
    return hook.lower().startswith(PREFIX)


def canonical(hook: str) -> str:
    """The hook string in lower case.

    Raises:
        HookOptionError: if PyTorch has none of that name that runs on every backend, or it takes no such option.
    """
    name, rank = _parsed(hook)
    return f"{PREFIX}{name}" + ("" if rank is None else f"(rank={rank})")


def takes_one_bucket(hook: str) -> bool:
    """Whether it hangs on Gloo with more than one bucket, as PyTorch's PowerSGD does."""
    return is_pytorchs(hook) and _parsed(hook)[0] == "powersgd"


def sent_share(hook: str) -> float:
    """What it sends, over what a plain all-reduce does; NaN where that depends on the model."""
    return _SHARE.get(_parsed(hook)[0], float("nan"))


def register(model: DistributedDataParallel, hook: str) -> None:
    """Register PyTorch's own hook on a DDP model; ``torch:none`` registers none."""
    name, rank = _parsed(hook)
    if name == "none":
        return
    from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook

    if name == "powersgd":
        state = powerSGD_hook.PowerSGDState(None, matrix_approximation_rank=rank or 1, start_powerSGD_iter=2)
        model.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
        return
    functions: dict[str, Callable[..., Any]] = {
        "allreduce": default_hooks.allreduce_hook,
        "fp16": default_hooks.fp16_compress_hook,
        "bf16": default_hooks.bf16_compress_hook,
    }
    model.register_comm_hook(None, functions[name])


def _parsed(hook: str) -> tuple[str, int | None]:
    name, bracket, rest = hook[len(PREFIX) :].strip().lower().partition("(")
    known = name in _NAMES
    if known and not bracket:
        return name, 1 if name == "powersgd" else None
    key, _, value = rest.removesuffix(")").partition("=")
    if known and name == "powersgd" and key.strip() == "rank" and value.strip().isdigit() and int(value) > 0:
        return name, int(value)
    names = ", ".join(f"{PREFIX}{one}" for one in _NAMES)
    raise HookOptionError(f"{hook!r} is none of PyTorch's hooks that a bench can run: {names} (with a rank=).")
