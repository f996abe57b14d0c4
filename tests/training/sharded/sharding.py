"""Models that FSDP2 shards, on a mesh of replicas and shards, and a loop that trains them."""

import os

import attrs
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.debug import _clear_sharding_prop_cache

import commhub
from commhub.testing import bitwise_equal

WIDTH, WORDS = 16, 4
EVERY = "COMMHUB_EVERY_CHECK" in os.environ
"""Whether to run all cases; make test runs some of each kind."""


class Transformer(nn.Module):
    """An embedding, blocks, and a head; ``(rows, WORDS)`` numbers below 32 to ``(rows, WORDS, 32)``."""

    def __init__(self, blocks=2, seed=0, tied=False, inner=24):
        super().__init__()
        torch.manual_seed(seed)
        self.embedding = nn.Embedding(32, WIDTH)
        layer = nn.TransformerEncoderLayer
        self.blocks = nn.ModuleList(layer(WIDTH, 2, inner, dropout=0.0, batch_first=True) for _ in range(blocks))
        self.head = nn.Linear(WIDTH, 32, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens, skip=()):
        x = self.embedding(tokens)
        for number, block in enumerate(self.blocks):
            if number not in skip:
                x = block(x)
        return self.head(x)


def tokens(rank, step):
    generator = torch.Generator().manual_seed(1000 * rank + step)
    return torch.randint(32, (3, WORDS), generator=generator)


def mesh(shards=2):
    """Replicas of ``shards`` ranks. DTensor forgets the groups of a world that this process has left."""
    _clear_sharding_prop_cache()
    return init_device_mesh("cpu", (dist.get_world_size() // shards, shards), mesh_dim_names=("replicate", "shard"))


def shard(model, mesh, **options):
    """Each block a unit, and the rest one."""
    for block in model.blocks:
        fully_shard(block, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def sharded(on, hook=None, *, native=False, make=Transformer, register=None, **options):
    """A model on a mesh and its registration: of a hook between replicas, or ``native`` HSDP and None."""
    model = shard(make(), on if native else on["shard"], **options)
    if native or hook is None:
        return model, None
    return model, commhub.register(model, hook, process_group=on["replicate"], **(register or {}))


def loss_of(model, step, rank=None, **forward):
    rank = dist.get_rank() if rank is None else rank
    numbers = tokens(rank, step)
    out = model(numbers, **forward)
    return nn.functional.cross_entropy(out.flatten(0, 1).float(), numbers.flatten().roll(1))


def whole(tensor):
    """A copy of this rank's part, or of a tensor that is not sharded."""
    return getattr(tensor, "to_local", lambda: tensor)().detach().clone()


def gradients(model):
    return {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}


def parameters(model):
    return {name: whole(p) for name, p in model.named_parameters()}


@attrs.define
class Loop:
    """Trains a model; keeps the gradients of each step as the optimizer had them."""

    model: nn.Module
    clip: float | None = 0.5
    accumulate: int = 1
    optimizer: torch.optim.Optimizer = None
    step: int = 0

    def __attrs_post_init__(self):
        self.optimizer = self.optimizer or torch.optim.AdamW(self.model.parameters(), lr=1e-2)

    def run(self, steps, **forward):
        seen = []
        for _ in range(steps):
            for part in range(self.accumulate):
                if self.accumulate > 1:
                    self.model.set_requires_gradient_sync(part == self.accumulate - 1)
                loss_of(self.model, self.step * self.accumulate + part, **forward).backward()
            if self.clip:
                nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
            seen.append(gradients(self.model))
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.step += 1
        return [*seen, parameters(self.model)]


def same(a, b):
    """Whether two runs agree bit by bit."""
    return len(a) == len(b) and all(
        x.keys() == y.keys() and all(bitwise_equal(x[name], y[name]) for name in x) for x, y in zip(a, b, strict=True)
    )


def error_of(action, *args, **kwargs):
    """(type name, message) of what a call raises."""
    try:
        action(*args, **kwargs)
    except Exception as error:
        return type(error).__name__, str(error)
    return None, ""
