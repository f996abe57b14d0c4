"""A hook in place of the reduce-scatter of a model that FSDP2 shards: what comes out, and what the hook is given."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

import commhub

from .sharding import EVERY, Loop, Transformer, error_of, gradients, loss_of, same, shard, whole


def inside(hook=None, *, make=Transformer, register=None, **options):
    """A model sharded over all ranks and its registration, or None."""
    model = make()
    for block in getattr(model, "blocks", ()):
        fully_shard(block, **options)
    fully_shard(model, **options)
    return model, None if hook is None else commhub.register(model, hook, **(register or {}))


def against_native(hook, *, steps=4, loop=None, **options):
    native, _ = inside(**options)
    hooked, registration = inside(hook, **options)
    expected, found = (Loop(model, **(loop or {})).run(steps) for model in (native, hooked))
    far = max(float((a[n] - b[n]).abs().max()) for a, b in zip(expected, found) for n in a if a[n].numel())
    return same(expected, found), far, registration.step, registration.stats.last.sent_bytes


@pytest.mark.parametrize("hook", ["allreduce", "fp16", "bf16", "quantize_per_channel", "quantize_per_tensor", "quantize_per_channel(bits=4)"])
@pytest.mark.parametrize("nproc", [2, 3, 4])
def test_smoke(ranks, nproc, hook):
    print(ranks(against_native, nproc, hook))
