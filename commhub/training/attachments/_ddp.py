"""Where gradients come from: finding the DDP model in what a user hands over, and saying why one cannot be served."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel

from commhub._errors import HookOptionTypeError, RegistrationError
from commhub._printable import shown
from commhub.training._trained import trainable

from ._coming import Coming, replicas_in
from ._unserved import advice, refuse_sharded
from ._way_in import has_way_in

if TYPE_CHECKING:
    from collections.abc import Iterable

SLOT = "_commhub_slot"
"""The attribute of a DDP model under which commhub's one entry into it is kept."""
PYTHON_REDUCER = (
    "this DDP model was built for the python reducer (torch._dynamo.config.optimize_ddp = 'python_reducer'), which "
    "runs no commhub hooks. Build it in the default mode."
)


def inside(model: object) -> list[DistributedDataParallel | Coming]:
    """The DDP models that it is or holds; those of ``replicate()`` too, which may be still to come."""
    if isinstance(model, DistributedDataParallel):
        return [model]
    if not isinstance(model, nn.Module):
        return []
    return [*(one for one in model.modules() if isinstance(one, DistributedDataParallel)), *replicas_in(model)]


def find(model: object) -> DistributedDataParallel | Coming:
    """The DDP model in ``model``: itself, or the one that a wrapper holds (``torch.compile``, Fabric, ``replicate``).

    Raises:
        RegistrationError: if there is none, or more than one.
    """
    found = inside(model)
    if len(found) == 1:
        return found[0]
    if found:
        raise RegistrationError(f"{type(model).__name__} holds {len(found)} DDP models. Register each of them.")
    said = f"{type(model).__name__} is no DistributedDataParallel model and holds none."
    raise RegistrationError(f"{said} {advice(model)}")


def refuse(model: DistributedDataParallel | Coming) -> None:
    """Raise RegistrationError, with the reason, where this model cannot run a hook."""
    if isinstance(model, Coming):
        model.refuse()
        return
    refuse_sharded(trainable(model))
    if model.mixed_precision is not None:
        raise RegistrationError("DDP's mixed_precision= owns the model's one hook slot. Use torch.autocast, or wire=.")
    if model._use_python_reducer:
        raise RegistrationError(PYTHON_REDUCER)
    if any(hasattr(p, "_in_backward_optimizers") for p in model._module_parameters):
        raise RegistrationError(
            "an optimizer in backward owns the model's one hook slot. Use optimizer_overlap instead."
        )
    if model._delay_all_reduce_all_params:
        raise RegistrationError("the model reduces no gradients by hook: all its parameters are delayed.")
    if SLOT in model.__dict__ or has_way_in(model):
        return
    logged = "" if model._comm_hooks else model._get_ddp_logging_data().get("comm_hook", "")
    if model._comm_hooks or logged:
        name = logged or getattr(model._comm_hooks[0][0], "__qualname__", "a hook")
        raise RegistrationError(
            f"the model already has the communication hook {name!r}, and PyTorch takes one. Do not register that one."
        )


def check_devices(parameters: Iterable[nn.Parameter], backend: str) -> torch.device:
    """The device of the parameters whose gradients are averaged.

    Raises:
        RegistrationError: if they are on several, or where no driver can serve them.
    """
    devices = {p.device for p in parameters}
    if len(devices) != 1:
        raise RegistrationError(f"trained parameters are on {len(devices)} devices; one per process is supported.")
    device = devices.pop()
    check_device(device, backend)
    return device


def check_device(device: torch.device, backend: str) -> None:
    """Raise RegistrationError where no driver can serve gradients on a device."""
    if device.type == "cuda" and "nccl" not in backend:
        raise RegistrationError(f"CUDA gradients on a {backend} group would be staged through the host. Use NCCL.")
    if device.type not in ("cpu", "cuda"):
        raise RegistrationError(f"gradients on {device.type!r} have no driver yet; cpu and cuda have.")


def as_group(given: object) -> object:
    """The group of a device mesh of one dimension; whatever else was given as it is.

    Raises:
        RegistrationError: for a mesh of several dimensions.
    """
    if not isinstance(given, DeviceMesh):
        return given
    if given.ndim != 1:
        raise RegistrationError(
            f"process_group= is a device mesh of {given.ndim} dimensions; give one of them, such as "
            f"mesh[{(given.mesh_dim_names or ('replicate',))[0]!r}]."
        )
    return given.get_group()


def group_in(given: object) -> object:
    """The same, where an error is to be told: what is no group is none to tell it in."""
    try:
        return as_group(given)
    except RegistrationError:
        return None


def check_group(group: object) -> None:
    """Raise HookOptionTypeError for what is neither ``None`` nor a process group, of this process or of others."""
    group = as_group(group)
    if group is None or group is dist.GroupMember.NON_GROUP_MEMBER or isinstance(group, dist.ProcessGroup):
        return
    raise HookOptionTypeError(
        f"process_group is {shown(group)}; give a process group, a device mesh of one dimension, or None."
    )


def group_of(
    model: DistributedDataParallel | Coming | None, given: dist.ProcessGroup | DeviceMesh | None
) -> dist.ProcessGroup:
    """The group to average over: the model's own unless another one is given, never silently the world.

    A bare module, ``None`` here, has all ranks.

    Raises:
        RegistrationError: if there is none, or this process is not in it.
    """
    if not dist.is_initialized():
        raise RegistrationError("there is no process group. Call torch.distributed.init_process_group first.")
    own = dist.group.WORLD if model is None else model.process_group
    group = own if given is None else as_group(given)
    if group is None or group is dist.GroupMember.NON_GROUP_MEMBER:
        raise RegistrationError("this process is not in the process group that was given.")
    check_group(group)
    assert isinstance(group, dist.ProcessGroup)
    try:
        rank = dist.get_rank(group)
    except (ValueError, RuntimeError, KeyError) as error:
        text = f"the process group is gone ({error}). Wrap the model anew, in a group that has not been destroyed."
        raise RegistrationError(text) from error
    if rank < 0:
        raise RegistrationError("this process is not in the process group that was given.")
    return group
