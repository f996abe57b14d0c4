"""An average of the parameters that ended on one rank and not on another: the next hook begins with equal ones."""

import os

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import commhub
from commhub import HookError
from commhub.testing import assert_equal_across_ranks, batches, mlp
from commhub.testing._faults import Lost, faults

PERIOD = 2
EVERY = "COMMHUB_EVERY_CHECK" in os.environ


def backward(model, number):
    model.zero_grad()
    (x,) = batches(8)(dist.get_rank(), number)
    model(x).square().mean().backward()


def everything(model):
    return [p.detach().clone() for p in model.parameters()]


def made(hook, **given):
    model = DistributedDataParallel(mlp())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return model, optimizer, commhub.register(model, hook, optimizer=optimizer, **given)


def launched(hook):
    """How many collectives were launched before, and after, the step that ends with the second average."""
    with faults({}) as drivers:
        model, optimizer, registration = made(hook)
    for number in range(2 * PERIOD):
        first = drivers[0].launched
        backward(model, number)
        optimizer.step()
    end = drivers[0].launched
    registration.remove()
    return first, end


def lose(hook, then, place, who):
    with faults({place: Lost()} if dist.get_rank() == who else {}):
        model, optimizer, registration = made(hook, timeout=0.5)
    with pytest.raises(HookError):  # noqa: PT012 - a rank that missed nothing hears of it at the next average
        for number in range(3 * PERIOD):
            backward(model, number)
            optimizer.step()
    if then == "remove":
        registration.remove()
    elif then == "register":
        commhub.register(model, "allreduce", optimizer=optimizer)
    else:
        registration.swap(hook if then == "the same" else then)
    assert_equal_across_ranks(everything(model))
    for number in range(PERIOD):
        backward(model, number)
        optimizer.step()
    if then == "the same":
        registration.remove()
    assert_equal_across_ranks(everything(model))


def lost_everywhere(hook, then):
    first, end = launched(hook)
    for place in range(first, end) if EVERY else {first, end - 1}:
        lose(hook, then, place, place % dist.get_world_size())


HOOKS = ["periodic(period=2)", "diloco(period=2)", "post_local_sgd(start_step=1, period=2)"]
NEXT = ["register", "allreduce", "remove", "the same"]
PAIRS = [(hook, then) for hook in HOOKS for then in NEXT] if EVERY else list(zip(HOOKS, NEXT, strict=False))


@pytest.mark.parametrize("nproc", [2, 3] if EVERY else [2])
@pytest.mark.parametrize(("hook", "then"), PAIRS)
def test_parameters_are_equal_when_another_hook_begins(ranks, nproc, hook, then):
    ranks(lost_everywhere, nproc, hook, then, timeout=300)
