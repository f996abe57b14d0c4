"""What leaves ranks apart or waiting as users train: averaged weights swapped in, saves in between, BatchNorm."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import commhub
from commhub.testing import assert_equal_across_ranks, batches


def wrapped(hook, *, norm=False, **options):
    torch.manual_seed(0)
    layers = [nn.Linear(8, 8), *([nn.BatchNorm1d(8)] if norm else []), nn.Tanh(), nn.Linear(8, 4)]
    model = DistributedDataParallel(nn.Sequential(*layers))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return model, optimizer, commhub.register(model, hook, optimizer=optimizer, **options)


def backward(model, step):
    model.zero_grad()
    (x,) = batches(8)(dist.get_rank(), step)
    model(x).square().mean().backward()


def everything(model):
    return [p.detach() for p in model.module.parameters()]


def swap_weights(hook, module_only):
    model, optimizer, registration = wrapped(hook)
    twin, other, _ = wrapped(hook)
    for step in range(9):
        for one, its in ((model, optimizer), (twin, other)):
            backward(one, step)
            its.step()
        backup = copy.deepcopy(model.module.state_dict())
        averaged = {key: value * 0.9 for key, value in backup.items()}
        for weights in (averaged, backup):
            (model.module if module_only else model.module[0]).load_state_dict(
                weights if module_only else {k[2:]: v for k, v in weights.items() if k.startswith("0.")}
            )
            model.eval()
            with torch.no_grad():
                model(torch.ones(2, 8))
            model.train()
        assert all(torch.equal(a, b) for a, b in zip(everything(model), everything(twin), strict=True)), step
    registration.remove()
    assert_equal_across_ranks(everything(model))


@pytest.mark.parametrize("hook", ["diloco(period=4)", "periodic(period=2)"])
def test_weights_that_are_loaded_for_an_evaluation_and_put_back_change_nothing(ranks, hook):
    for module_only in (True, False):
        ranks(swap_weights, 2, hook, module_only)


def finish_in_between(hook):
    model, optimizer, registration = wrapped(hook)
    for step in range(4):
        backward(model, step)
        registration.finish()
        optimizer.step()
    registration.remove()
    assert_equal_across_ranks(everything(model))


@pytest.mark.parametrize("hook", ["periodic(period=1)", "periodic(period=2)", "diloco(period=1)"])
def test_what_steps_after_an_average_is_averaged_when_the_hook_is_removed(ranks, hook):
    ranks(finish_in_between, 2, hook)


def skip_before_an_evaluation(period):
    model, optimizer, registration = wrapped(f"periodic(period={period})", norm=True, timeout=5)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    for step in range(6):
        model.zero_grad()
        (x,) = batches(8)(dist.get_rank(), step)
        loss = scaler.scale(model(x).square().mean())
        loss.backward()
        if step == 3 and dist.get_rank() == 1:
            next(model.module.parameters()).grad.fill_(torch.inf)
        scaler.step(optimizer)
        scaler.update()
        model.eval()
        with torch.no_grad():
            model(x)
        model.train()
    registration.finish()
    assert_equal_across_ranks(everything(model)[:1] if period == 1 else [torch.ones(1)])
    return registration.step


def test_a_rank_whose_step_was_skipped_is_there_for_the_average_before_an_evaluation_of_all_ranks(ranks):
    for period in (1, 2):
        assert ranks(skip_before_an_evaluation, 2, period, timeout=40) == [6, 6]
