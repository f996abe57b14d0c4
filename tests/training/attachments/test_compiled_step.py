"""A step that is compiled as a whole, its backward included, does what it does uncompiled, bit by bit.

The compiler follows what is called on the thread that it runs a step on: hooks on parameters, DDP's communication
hook and the callbacks after a backward. It must find nothing of commhub's there.
"""

import os

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import commhub
from commhub.testing import bitwise_equal

EVERYTHING = bool(os.environ.get("COMMHUB_EVERY_CHECK"))
COMPRESSED = "powersgd(rank=2, start_step=2, min_compression_rate=0.5)"
LOCAL = "post_local_sgd(start_step=2, period=2)"
MODES = {
    "plain": {},
    "unused": {"find_unused_parameters": True},
    "static": {"static_graph": True},
    "views": {"gradient_as_bucket_view": True},
}

EVERY = [
    *(("allreduce", "plain", False, backend) for backend in ("eager", "aot_eager", "inductor")),
    *((hook, "plain", whole, "eager") for hook in (COMPRESSED, LOCAL, "optimizer_overlap") for whole in (False, True)),
    *((LOCAL, mode, whole, "eager") for mode in MODES if mode != "plain" for whole in (False, True)),
]
QUICK = [(LOCAL, "unused", True, "eager")]


def drawn(step):
    generator = torch.Generator().manual_seed(10 * step + torch.distributed.get_rank())
    return torch.randn(6, 12, generator=generator), torch.randn(6, 4, generator=generator)


def trained(hook, mode, whole, backend):
    """The parameters after each of five steps; ``whole``: the optimizer's step is compiled, too."""
    torch.manual_seed(3)
    # Two buckets: the compiler takes no smaller ones than 1 MiB.
    net = nn.Sequential(nn.Linear(12, 512), nn.ReLU(), nn.Linear(512, 600), nn.ReLU(), nn.Linear(600, 4))
    model = DistributedDataParallel(net, bucket_cap_mb=1, **MODES[mode])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    registration = commhub.register(model, hook, optimizer=optimizer)

    def step(x, y):
        (model(x) - y).square().mean().backward()
        if whole:
            optimizer.step()

    if backend is not None:
        step = torch.compile(step, backend=backend)
    seen = []
    for number in range(5):
        optimizer.zero_grad()
        step(*drawn(number))
        if not whole:
            optimizer.step()
        seen.append([p.detach().clone() for p in net.parameters()])
    assert registration.step == registration.stats.steps == 5
    return seen


def compared(hook, mode, whole, backend):
    torch._dynamo.reset()  # what another test has compiled
    plain, compiled = (trained(hook, mode, whole, one) for one in (None, backend))
    for number, (expected, found) in enumerate(zip(plain, compiled, strict=True)):
        for i, (a, b) in enumerate(zip(expected, found, strict=True)):
            if backend == "inductor":  # its kernels round otherwise
                torch.testing.assert_close(b, a, msg=lambda text, n=number, i=i: f"step {n}, parameter {i}: {text}")
            else:
                assert bitwise_equal(b, a), f"step {number}, parameter {i}"


@pytest.mark.parametrize(("hook", "mode", "whole", "backend"), EVERY if EVERYTHING else QUICK)
def test_a_compiled_step_is_what_it_is_uncompiled(ranks, hook, mode, whole, backend):
    ranks(compared, 2, hook, mode, whole, backend, timeout=240)


class Fails:
    """A hook that cannot."""

    def prepare(self, setup):
        pass

    def reduce(self, bucket):
        raise ZeroDivisionError("planned")
        yield


def told():
    torch._dynamo.reset()
    net = nn.Linear(12, 4)
    model = DistributedDataParallel(net)
    commhub.register(model, Fails())
    step = torch.compile(lambda x, y: (model(x) - y).square().mean().backward(), backend="eager")
    with pytest.raises(commhub.HookError, match="ZeroDivisionError: planned"):
        step(*drawn(0))


def test_a_failure_in_a_compiled_step_is_told_as_in_any_other(ranks):
    ranks(told, 2)
