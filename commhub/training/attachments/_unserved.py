"""Models of other kinds: who owns the reduction of their gradients, and what to do with those that no call serves.

PyTorch's own are looked up among the modules that are loaded: who has such a model has imported its class.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from torch import nn

from commhub._errors import RegistrationError
from commhub.registry._models import advice_on, owner_advice

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor

_FSDP1 = "torch.distributed.fsdp.fully_sharded_data_parallel", "FullyShardedDataParallel"
_FSDP2 = "torch.distributed.fsdp", "FSDPModule"
_NATIVE = "torch.distributed._composable.replicate_with_fsdp", "ReplicateModule"
_DTENSOR = "torch.distributed.tensor", "DTensor"

_REPLICAS = 'commhub.register(model, hook, process_group=mesh["replicate"])'
_PARALLEL = (
    'Wrap the module in DistributedDataParallel(module, device_mesh=mesh["replicate"]), over the dimension of the mesh '
    "that holds its replicas, and register on that before the first forward."
)


def _kind(place: tuple[str, str]) -> Any:
    return getattr(sys.modules.get(place[0]), place[1], ())


def refuse_owners(model: object) -> None:
    """Raise RegistrationError where what ``model`` is or holds leaves no gradients to a hook, whatever is called."""
    why = _owned(model)
    if why:
        raise RegistrationError(why)


def _owned(model: object) -> str:
    """Why nothing can serve it, in sentences; empty where something may."""
    parts: list[object] = [*model.modules()] if isinstance(model, nn.Module) else [model]
    if any(isinstance(part, _kind(_FSDP1)) for part in parts):
        return (
            "FullyShardedDataParallel (FSDP1) shards parameters and reduces their gradients itself, and no hook takes "
            f"its place. Use fully_shard (FSDP2): shard inside a host and register between replicas, with {_REPLICAS}; "
            "docs/sharded.md shows how."
        )
    if any(isinstance(part, _kind(_NATIVE)) for part in parts):
        return (
            "a module of torch.distributed._composable.replicate_with_fsdp averages by an all-reduce of its own, in "
            "which no hook has a place. Use torch.distributed._composable.replicate(module), or "
            "torch.nn.parallel.DistributedDataParallel."
        )
    owned = owner_advice(dict.fromkeys(map(type, parts)))
    return "" if owned is None else f"no hook can serve {owned[0]}. {owned[1]}"


def refuse_bare(module: nn.Module) -> None:
    """Raise RegistrationError, with what serves it, where the gradients of a module cannot be averaged by hand."""
    why = _split(module)
    if why:
        raise RegistrationError(why)


def _split(module: nn.Module) -> str:
    """What to do with a module whose parameters are DTensors, in sentences; empty for any other."""
    name = sharded_in(module.named_parameters())
    if name and any(isinstance(part, _kind(_FSDP2)) for part in module.modules()):
        return (
            f"fully_shard has sharded {name!r}: FSDP reduces these gradients itself. Register between its replicas, "
            f"with {_REPLICAS}."
        )
    return f"{name!r} is a DTensor, of which each rank holds a part. {_PARALLEL}" if name else ""


def refuse_sharded(parameters: Iterable[tuple[str, Tensor]]) -> None:
    """Raise RegistrationError where a DDP model has been given a DTensor, which its buckets cannot hold."""
    name = sharded_in(parameters)
    if name:
        raise RegistrationError(
            f"{name!r} is a DTensor, and DDP lays gradients out in buckets of plain tensors. {_PARALLEL}"
        )


def sharded_in(parameters: Iterable[tuple[str, Tensor]]) -> str:
    """The name of the first that is a DTensor; empty if none is."""
    return next((name for name, p in parameters if isinstance(p, _kind(_DTENSOR))), "")


def advice(model: object) -> str:
    """What to do with what is no DDP model and holds none, in sentences."""
    known = advice_on(model) or _owned(model)
    if known:
        return known
    if isinstance(model, nn.DataParallel):
        return (
            "DataParallel spreads one process over its devices and averages nothing between processes. Start one "
            "process per device, and register on DistributedDataParallel(model.module)."
        )
    if isinstance(model, nn.Module):
        return _split(model) or (
            "Wrap it in one, or use commhub.manual(module, hook) and call .average() after backward."
        )
    if isinstance(model, list | tuple | set | dict) and len(model) > 1:
        return "Give one torch.nn.parallel.DistributedDataParallel model, and call this for each of them."
    if isinstance(model, type):
        return "Give an instance of torch.nn.parallel.DistributedDataParallel, not a class."
    return "Give the torch.nn.parallel.DistributedDataParallel model itself."
