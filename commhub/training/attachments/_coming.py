"""The DDP model that ``replicate(module)`` makes in the module's first forward, before there is one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from commhub._errors import RegistrationError
from commhub.training._replicated import ddp_of, state_of
from commhub.training._trained import trainable

from ._unserved import sharded_in
from ._way_in import PASSES_ON

if TYPE_CHECKING:
    from torch import nn
    from torch.nn.parallel import DistributedDataParallel

    from commhub.training._trained import Named

_BUCKET_CAP_MB = 25
"""DDP's own default, in MiB."""


class Coming:
    """What is known of it.

    Attributes:
        module: the one that ``replicate()`` was given.
        state: what ``replicate()`` keeps for it.
        find_unused_parameters, static_graph, bucket_bytes_cap: as the DDP model will have them.
    """

    def __init__(self, module: nn.Module, state: Any) -> None:
        self.module, self.state = module, state
        self._given = given = dict(state._init_kwargs)
        self.find_unused_parameters = bool(given.get("find_unused_parameters", False))
        self.static_graph = bool(given.get("static_graph", False))
        cap = given.get("bucket_cap_mb")
        self.bucket_bytes_cap = int((_BUCKET_CAP_MB if cap is None else cap) * 2**20)

    @property
    def process_group(self) -> dist.ProcessGroup | None:
        """The group that the DDP model will average over."""
        mesh = self._given.get("device_mesh")
        if mesh is not None:
            group: dist.ProcessGroup = mesh.get_group(mesh_dim=0)
            return group
        return self._given.get("process_group") or dist.group.WORLD

    @property
    def parameters(self) -> tuple[Named, ...]:
        """Those that it will average, if nothing changes."""
        return tuple(trainable(self.module))

    @property
    def device(self) -> torch.device:
        """Where they are; the model's first one says. Host memory, if there are none, which ``refuse`` tells."""
        return next((p.device for _, p in self.parameters), torch.device("cpu"))

    def refuse(self) -> None:
        """Raise RegistrationError, with the reason, where the DDP model will run no hook."""
        if self._given.get("mixed_precision") is not None:
            raise RegistrationError(
                "mixed_precision= of replicate() owns the model's one hook slot. Use torch.autocast, or wire=."
            )
        for given, named in self.state._comm_hook_args:
            function = named.get("hook", given[-1] if given else None)
            if not hasattr(function, PASSES_ON):
                raise RegistrationError(
                    f"the model already has the communication hook {getattr(function, '__qualname__', 'a hook')!r}, "
                    "and PyTorch takes one. Do not register that one."
                )
        if not self.parameters:
            raise RegistrationError("replicate() was given no trainable parameters to average.")
        name = sharded_in(self.parameters)
        if name:
            raise RegistrationError(
                f"{name!r} is a DTensor, which replicate() replaces in the first forward. Register after that."
            )


def replicas_in(model: nn.Module) -> list[DistributedDataParallel | Coming]:
    """The DDP models of all modules in ``model`` that ``replicate()`` was given; made, or to come."""
    found: list[DistributedDataParallel | Coming] = []
    for module in model.modules():
        state = state_of(module)
        if state is not None and (made := ddp_of(state)) is not None:
            found.append(made)
        elif state is not None and state._init_args:
            found.append(Coming(module, state))
    return found
