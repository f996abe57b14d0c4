"""The model as it is trained: replicated by DDP, or sharded by FSDP2 over groups of ranks, or over all of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs
import torch
import torch.distributed as dist

from . import _pytorch
from ._model import Transformer

if TYPE_CHECKING:
    from torch import nn
    from torch.distributed.device_mesh import DeviceMesh
    from torch.nn.parallel import DistributedDataParallel

    from ._options import Settings
    from ._sizes import ModelSize

_EVERYTHING = 1 << 20
"""A bucket's size in MiB that every model fits into."""


@attrs.frozen
class Wrapped:
    """A transformer that is trained on all ranks.

    Attributes:
        model: to call and to register on.
        bare: the transformer itself; of a sharded one its parameters are on this rank in part.
        exchange: the ranks among which a hook works: those with the same shards, or where there are no others all that
            the model is sharded over. ``None`` for the model's own.
        ddp: the model, if it is one of DDP.
    """

    model: nn.Module
    exchange: DeviceMesh | None
    bare: Transformer
    _size: ModelSize
    _device: torch.device
    ddp: DistributedDataParallel | None = None

    def whole(self) -> Transformer:
        """The transformer with all of its parameters on this rank. Collective."""
        if self.exchange is None:
            return self.bare
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        state = get_model_state_dict(self.model, options=StateDictOptions(full_state_dict=True))
        whole = Transformer(self._size).to(self._device)
        whole.load_state_dict(state)
        return whole


def wrap(
    settings: Settings, size: ModelSize, device: torch.device, *, hook: str = "", like: Wrapped | None = None
) -> Wrapped:
    """A transformer with the seed's initial weights, for DDP or for FSDP2. Collective.

    Under DDP its weights are in the very memory of those of ``like``, and its gradients in buckets that ``hook`` takes.
    """
    torch.manual_seed(settings.seed)
    bare = Transformer(size).to(device)
    if like is not None and settings.shard == 1:
        for parameter, other in zip(bare.parameters(), like.bare.parameters(), strict=True):
            parameter.data = other.data
    if settings.shard == 1:
        from torch.nn.parallel import DistributedDataParallel

        ids = [device.index] if device.type == "cuda" else None
        cap = _EVERYTHING if _pytorch.takes_one_bucket(hook) else settings.bucket_cap_mb
        # All ranks have made the same weights: to send them over a slow link again would take long.
        ddp = DistributedDataParallel(bare, device_ids=ids, bucket_cap_mb=cap, init_sync=like is None)
        return Wrapped(ddp, None, bare, size, device, ddp)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    shape = (dist.get_world_size() // settings.shard, settings.shard)
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=("replicate", "shard"))
    for block in bare.blocks:
        fully_shard(block, mesh=mesh["shard"])
    fully_shard(bare, mesh=mesh["shard"])
    return Wrapped(bare, mesh["shard" if shape[0] == 1 else "replicate"], bare, size, device)


def make_optimizer(name: str, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer ``name``; its learning rate is to be set."""
    if name == "sgd":  # as in Vogels et al. 2019: linear in the gradient, so that error feedback loses nothing
        return torch.optim.SGD(model.parameters(), momentum=0.9, nesterov=True)
    return torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.1)
