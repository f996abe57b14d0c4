"""Local SGD between replicas: parameters of shards are averaged, against the same done by hand in float64."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy

import commhub

from .sharding import EVERY, Transformer, gradients, loss_of, mesh, parameters, same, shard

TIMEOUT = 20.0
POST = "post_local_sgd(start_step=2, period=3, local_gradients=false)"


def mean_(tensors, group):
    """The mean over a group in float64, in place."""
    for tensor in tensors:
        every = [torch.empty_like(tensor, dtype=torch.float64) for _ in range(dist.get_world_size(group))]
        if tensor.numel():
            dist.all_gather(every, tensor.detach().to(torch.float64).contiguous(), group=group)
            tensor.copy_(torch.stack(every).mean(0))


@torch.no_grad()
def by_hand(model, optimizer, on, steps, averages, *, exchanged=0, buffers=False):
    """FSDP on the shards alone, and the replicas' mean: of gradients in the first steps, of parameters after some."""
    group, seen = on["replicate"].get_group(), []
    for step in range(steps):
        with torch.enable_grad():
            loss_of(model, step).backward()
        if step < exchanged:
            mean_([p.grad.to_local() for p in model.parameters() if p.grad is not None], group)
        seen.append(gradients(model))
        optimizer.step()
        optimizer.zero_grad()
        if step in averages:
            mean_([p.to_local() for p in model.parameters()], group)
            if buffers:
                mean_([b for b in model.buffers() if b.is_floating_point()], group)
        seen.append(parameters(model))
    return seen


def trained(model, optimizer, steps, first=0):
    seen = []
    for step in range(first, first + steps):
        loss_of(model, step).backward()
        seen.append(gradients(model))
        optimizer.step()
        optimizer.zero_grad()
        seen.append(parameters(model))
    return seen


KINDS = {
    "blocks": (Transformer, {}),
    "kept whole after forward": (Transformer, {"reshard_after_forward": False}),
    "bfloat16": (Transformer, {"mp_policy": MixedPrecisionPolicy(torch.bfloat16, torch.float32)}),
    "reduced in bfloat16": (Transformer, {"mp_policy": MixedPrecisionPolicy(torch.bfloat16)}),
    "offloaded": (Transformer, {"offload_policy": CPUOffloadPolicy(pin_memory=False)}),
    "tied": (lambda: Transformer(tied=True), {}),
    "frozen": (lambda: frozen(Transformer()), {}),
    "uneven": (lambda: Odd(inner=7), {}),
    "one unit": (lambda: Transformer(blocks=0), {}),
}


class Odd(Transformer):
    """Parts of different sizes, and none of the scale on the second rank."""

    def __init__(self, **options):
        super().__init__(**options)
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, tokens):
        return super().forward(tokens) * self.scale


def frozen(model):
    model.blocks[0].requires_grad_(False)
    return model


def adam(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


def against_the_hand(hook, steps, averages, exchanged, kind, shards=2):
    """Gradients and parameters after each step, here and by hand; how many replicas' parameters end apart."""
    on = mesh(shards)
    make, options = KINDS[kind]
    model = shard(make(), on["shard"], **options)
    optimizer = adam(model)
    registration = commhub.register(model, hook, process_group=on["replicate"], optimizer=optimizer, timeout=TIMEOUT)
    native = shard(make(), on["shard"], **options)
    expected = by_hand(native, adam(native), on, steps, averages, exchanged=exchanged)
    found = trained(model, optimizer, steps)
    return same(found, expected), registration.step


SOME = ["blocks", "bfloat16", "uneven"]


@pytest.mark.parametrize("kind", list(KINDS) if EVERY else SOME)
def test_post_local_sgd_is_what_is_done_by_hand(ranks, kind):
    assert ranks(against_the_hand, 4, POST, 7, {2, 5}, 2, kind) == [(True, 7)] * 4


@pytest.mark.parametrize("nproc", [2, 4])
@pytest.mark.parametrize("kind", list(KINDS) if EVERY else ["blocks"])
def test_an_averager_by_itself_is_what_is_done_by_hand(ranks, nproc, kind):
    assert (
        ranks(against_the_hand, nproc, "periodic(period=2)", 5, {0, 2, 4}, 0, kind, nproc // 2) == [(True, 5)] * nproc
    )
