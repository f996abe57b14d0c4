"""What ends a backward from outside: a Ctrl-C, or a fault of commhub's own. The model stays of use."""

import signal
import threading
import time

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import commhub
from commhub.testing import assert_equal_across_ranks, current


def build():
    torch.manual_seed(0)
    layers = [torch.nn.Linear(16, 16) for _ in range(6)]
    return DistributedDataParallel(torch.nn.Sequential(*layers), bucket_cap_mb=0.001)


def backward(model, step):
    model.zero_grad()
    x = torch.randn(4, 16, generator=torch.Generator().manual_seed(100 * step + dist.get_rank()))
    model(x).pow(2).mean().backward()


def as_bare(model):
    """Three more steps have the gradients that a model without a hook has, bit by bit."""
    twin = build()
    for m in (model, twin):
        for step in range(5):
            backward(m, step)
    grads, expected = ([p.grad for p in m.parameters()] for m in (model, twin))
    assert all(torch.equal(a, b) for a, b in zip(grads, expected, strict=True))
    assert_equal_across_ranks(grads)


class Slow:
    """Holds every rank's step up until all ranks have been interrupted."""

    def __init__(self, hub):
        self.hub, self.interrupted = hub, threading.Event()

    def reduce(self, bucket):
        mean = (yield commhub.AllReduce(bucket.flat)).clone()
        if bucket.step == 2 and bucket.index == 0:
            self.interrupted.wait(20)
            self.hub.add("seen", 1)
            while int(self.hub.add("seen", 0)) < bucket.world_size:
                time.sleep(0.01)
        bucket.flat.copy_((yield commhub.AllReduce(mean)))


def interrupt():
    model, hook = build(), Slow(current().store)
    registration = commhub.register(model, hook, timeout=30)
    for step in range(2):
        backward(model, step)

    def press():
        time.sleep(0.2)
        signal.raise_signal(signal.SIGINT)
        time.sleep(0.2)
        hook.interrupted.set()

    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    threading.Thread(target=press, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        backward(model, 2)
    registration.swap("allreduce")
    as_bare(model)


def test_after_a_ctrl_c_in_backward_the_hook_can_be_swapped_and_the_model_trained(ranks):
    ranks(interrupt, 2, timeout=60)


class Planned(Exception):
    pass


def break_the_core(where, place):
    model = build()
    registration = commhub.register(model, "allreduce", timeout=30)
    for step in range(2):
        backward(model, step)
    engine = registration._session.engine
    former, calls = getattr(type(engine), where), []

    def fails(self, *args, **kwargs):
        calls.append(None)
        if len(calls) == place + 1:
            raise Planned
        return former(self, *args, **kwargs)

    setattr(type(engine), where, fails)
    try:
        with pytest.raises(Planned):
            backward(model, 2)
    finally:
        setattr(type(engine), where, former)
    registration.swap("allreduce")
    as_bare(model)


@pytest.mark.parametrize(("where", "place"), [("begin", 0), ("add", 0), ("add", 3)])
def test_a_fault_of_the_core_itself_is_raised_after_backward_and_leaves_the_model_usable(ranks, where, place):
    ranks(break_the_core, 2, where, place, timeout=60)
