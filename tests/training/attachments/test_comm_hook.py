"""Functions for DDP's own ``register_comm_hook`` that pass their buckets on: they register in the first backward."""

import copy
import gc
import itertools
import logging
import os
import pickle
import weakref

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import commhub
from commhub.testing import Branches, assert_equal_across_ranks, batches, bitwise_equal, mlp

EVERY = bool(os.environ.get("COMMHUB_EVERY_CHECK"))
ONE, MANY = 25, 0.0005  # bucket caps in MiB


@commhub.comm_hook
def plain(model, state):
    """Registers the plain average."""
    commhub.register(model, "allreduce", process_group=state)


@commhub.comm_hook
def chosen(model, state):
    commhub.register(model, state)


def layers():
    torch.manual_seed(1)
    return nn.Sequential(*[nn.Linear(8, 8) for _ in range(12)])


def trained(model, steps=4, first=0):
    """The gradients after each of some steps."""
    make, rank, gradients = batches(8), dist.get_rank(), []
    for number in range(first, first + steps):
        model.zero_grad()
        model(make(rank, number)[0]).square().mean().backward()
        gradients.append({name: p.grad.clone() for name, p in model.module.named_parameters() if p.grad is not None})
        with torch.no_grad():
            for p in model.parameters():
                p -= 0 if p.grad is None else 0.1 * p.grad
    return gradients


def equal(a, b):
    return len(a) == len(b) and all(
        x.keys() == y.keys() and all(bitwise_equal(x[name], y[name]) for name in x) for x, y in zip(a, b, strict=True)
    )


def as_without_a_hook(modes, make, count=1):
    reference = trained(DistributedDataParallel(make(), **modes))
    for _ in range(count):
        model = DistributedDataParallel(make(), **modes)
        model.register_comm_hook(None, plain)
        assert equal(trained(model), reference)
        registration = commhub.registration(model)
        assert (str(registration), registration.step) == ("allreduce", 4)
        registration.close()


MODES = {
    "plain": {},
    "views": {"gradient_as_bucket_view": True},
    "unused": {"find_unused_parameters": True},
    "static": {"static_graph": True},
    "static views": {"static_graph": True, "gradient_as_bucket_view": True},
}


@pytest.mark.parametrize("modes", MODES.values(), ids=MODES)
def test_it_is_bit_equal_to_no_hook_from_the_first_step_on(ranks, modes):
    ranks(as_without_a_hook, 2, {**modes, "bucket_cap_mb": MANY}, layers)


def unused_branches(modes):
    model, other = (DistributedDataParallel(Branches(), **modes) for _ in range(2))
    model.register_comm_hook(None, plain)
    make, rank = batches(8), dist.get_rank()
    for number in range(4):
        for one in (model, other):
            one(make(rank, number)[0]).square().mean().backward()
        assert equal(
            [{n: p.grad for n, p in model.named_parameters() if p.grad is not None}],
            [{n: p.grad for n, p in other.named_parameters() if p.grad is not None}],
        )
    return [flags for flags in seen_used]


seen_used = []


@pytest.mark.skipif(not EVERY, reason="COMMHUB_EVERY_CHECK")
@pytest.mark.parametrize("nproc", [2, 3, 4])
@pytest.mark.parametrize("cap", [ONE, MANY], ids=["one bucket", "twelve buckets"])
def test_it_is_so_a_hundred_times(ranks, nproc, cap):
    ranks(as_without_a_hook, nproc, {"bucket_cap_mb": cap}, layers, 100, timeout=400)
