"""step="auto": nobody calls optimizer.step(), and parameters and optimizers' state end as with plain DDP and it."""

import contextlib
import itertools
import os

import pytest
import torch
from commhub_optimizer_overlap import OptimizerOverlap
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import commhub
from commhub.testing import assert_equal_across_ranks, bitwise_equal

from .test_equal import MANY, ONE, OPTIMIZERS, Pair, batch, same

EVERY = bool(os.environ.get("COMMHUB_EVERY_CHECK"))


class ByItself(Pair):
    """The loop of the second model has backward and its schedulers, and nothing else."""

    def __init__(self, optimizers, cap=MANY, **mode):
        super().__init__(optimizers, cap, hook='optimizer_overlap(step="auto")', **mode)

    def zero(self):
        for optimizer in self.optimizers[0]:
            optimizer.zero_grad()

    def update(self):
        for optimizer in self.optimizers[0]:
            optimizer.step()
        for scheduler in itertools.chain(*self.schedulers):
            scheduler.step()

    def differences(self):
        plain, hooked = (dict(model.module.named_parameters()) for model in self.models)
        found = [name for name in plain if not bitwise_equal(plain[name].detach(), hooked[name].detach())]
        found += [f"{name}.grad" for name in plain if hooked[name].grad is not None]
        states = ([one.state_dict() for one in several] for several in self.optimizers)
        return found if same(*states) else [*found, "the optimizers' states"]


def trained(cap):
    for name in OPTIMIZERS if EVERY else ("SGD", "Muon and AdamW"):
        for mode in ({}, {"find_unused_parameters": True}, {"gradient_as_bucket_view": True}):
            pair = ByItself(OPTIMIZERS[name], cap, **mode)
            for number in range(6):
                pair.zero()
                pair.backward(batch(number, 1), True, sync=number % 3 != 1)
                if number % 3 == 1:  # gradients of two batches, synchronised with the second
                    pair.backward(batch(number, 2), True)
                pair.update()
                assert pair.differences() == [], (name, mode, number)


@pytest.mark.parametrize(("nproc", "cap"), [(2, MANY), *([(3, ONE)] if EVERY else [])])
def test_it_is_plain_training_bit_by_bit(ranks, nproc, cap):
    ranks(trained, nproc, cap)


class FailsOnce:
    def reduce(self, bucket):
        if (bucket.step, bucket.index, bucket.rank) == (2, 1, 0):
            raise ZeroDivisionError("planned")
        bucket.flat.copy_((yield commhub.AllReduce(bucket.flat)))


def failing():
    """A step that fails changes no parameter; afterwards training goes on."""
    model = DistributedDataParallel(nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(4))), bucket_cap_mb=1e-6)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    hook = OptimizerOverlap(inner=FailsOnce(), step="auto")
    registration = commhub.register(model, hook, optimizer=optimizer, timeout=20)
    for number in range(3):
        before = [p.detach().clone() for p in model.parameters()]
        with pytest.raises(commhub.HookError, match="planned") if number == 2 else contextlib.nullcontext():
            model(torch.ones(2, 4)).square().mean().backward()
        stayed = [bitwise_equal(p.detach(), q) for p, q in zip(model.parameters(), before, strict=True)]
        assert stayed == [number == 2] * 4
    registration.swap("optimizer_overlap(step='auto')")
    optimizer.zero_grad()
    model(torch.ones(2, 4)).square().mean().backward()
    assert not any(bitwise_equal(p.detach(), q) for p, q in zip(model.parameters(), before, strict=True))
    assert_equal_across_ranks([p.detach() for p in model.parameters()])


def test_a_step_that_fails_changes_nothing_and_the_next_hook_goes_on(ranks):
    ranks(failing, 2)


def scaled():
    model = DistributedDataParallel(nn.Linear(2, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu")
    with pytest.raises(commhub.RegistrationError, match="a loss scaler decides whether to step"):
        commhub.register(model, "optimizer_overlap", step="auto", optimizer=optimizer, scaler=scaler)


def test_with_a_loss_scaler_it_is_refused(ranks):
    ranks(scaled, 2)


def test_who_steps_is_the_user_or_the_hook():
    with pytest.raises(commhub.HookOptionError, match="step is 'never', none of 'user', 'auto'"):
        commhub.create("optimizer_overlap", step="never")
