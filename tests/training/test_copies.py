"""Copies of what a hook works on, pickled, deep or averaged, train by themselves and leave the hook alone."""

import copy
import io
import os
import pickle

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrizations
from torch.optim.swa_utils import AveragedModel

import commhub
from commhub.testing import assert_equal_across_ranks, batches, bitwise_equal


def through_torch(what):
    file = io.BytesIO()
    torch.save(what, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def through_pickle(what):
    return pickle.loads(pickle.dumps(what))


WAYS = (through_torch, through_pickle, copy.deepcopy)
EVERY = "COMMHUB_EVERY_CHECK" in os.environ
HOOKS = {
    "register": ("periodic(period=2)", "optimizer_overlap"),
    "manual": ("periodic(period=2)",),
}
if EVERY:
    HOOKS["register"] += ("allreduce", "powersgd_rank2", "diloco(period=2)")
    HOOKS["manual"] += ("allreduce", "diloco(period=2)")


def made(way, hook, wrap=lambda layer: layer):
    """A module, its optimizer, its registration, and a function that trains them by a step."""
    torch.manual_seed(0)
    module = nn.Sequential(wrap(nn.Linear(8, 8)), nn.Tanh(), nn.Linear(8, 4))
    optimizer = torch.optim.Adam(module.parameters(), lr=0.01)
    model = DistributedDataParallel(module) if way == "register" else module
    registration = getattr(commhub, way)(model, hook, optimizer=optimizer, timeout=20)
    is_late = way == "manual" and hook != "allreduce"

    def step(number):
        optimizer.zero_grad()
        (x,) = batches(8)(dist.get_rank(), number)
        model(x).square().mean().backward()
        if is_late:
            optimizer.step()
        if way == "manual":
            registration.average()
        if not is_late:
            optimizer.step()

    return module, optimizer, registration, step


def train_alone(module, optimizer, number):
    (x,) = batches(8)(dist.get_rank(), number)
    optimizer.zero_grad()
    module(x).square().mean().backward()
    optimizer.step()


def values(module):
    return [p.detach().clone() for p in module.parameters()]


def copied(way, hook):
    """The copies train on rank 0 alone, more than a period; a hook that took part would wait for the other rank."""
    twin = made(way, hook)
    module, optimizer, registration, step = made(way, hook)
    for number in range(3):
        step(number)
        twin[3](number)
    sent, steps, before = registration.stats.sent_bytes, registration.step, values(module)
    for make in WAYS:
        where = f"{way}, {hook}, {make.__name__}"
        other, its = make((module, optimizer))
        assert all(map(bitwise_equal, values(other), before)), where
        if dist.get_rank() == 0:
            for number in range(5):
                train_alone(other, its, number)
            assert not any(map(torch.equal, values(other), before)), f"{where}: the copy does not train"
        assert (registration.stats.sent_bytes, registration.step) == (sent, steps), where
        assert all(map(bitwise_equal, values(module), before)), f"{where}: the original has moved"
    for number in range(3, 7):
        step(number)
        twin[3](number)
    assert all(map(bitwise_equal, values(module), values(twin[0]))), f"{way}, {hook}: it goes on otherwise"
    registration.remove()
    assert_equal_across_ranks(values(module))


@pytest.mark.parametrize("way", HOOKS)
def test_copies_train_without_the_hook_and_the_original_goes_on_with_it(ranks, way):
    for hook in HOOKS[way]:
        ranks(copied, 2, way, hook)


def averaged_and_parametrized(way, hook):
    module, _, registration, step = made(way, hook, parametrizations.weight_norm)
    mean = AveragedModel(module)
    for number in range(5):
        step(number)
        mean.update_parameters(module)
    assert registration.step == 5
    sent = registration.stats.sent_bytes
    if dist.get_rank() == 0:
        with torch.no_grad():
            mean(torch.ones(2, 8))
        train_alone(mean, torch.optim.SGD(mean.parameters(), lr=0.1), 0)
    assert (registration.stats.sent_bytes, registration.step) == (sent, 5)
    registration.remove()
    assert_equal_across_ranks(values(module))


@pytest.mark.parametrize("way", HOOKS)
def test_averaged_models_and_parametrized_ones(ranks, way):
    for hook in HOOKS[way]:
        ranks(averaged_and_parametrized, 2, way, hook)
