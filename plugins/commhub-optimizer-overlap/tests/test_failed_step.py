"""A step that fails counts on all ranks or on none: training ends where it would have without the failure."""

import contextlib
import os
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from commhub_optimizer_overlap import OptimizerOverlap, ZeroOverlap
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

import commhub
from commhub import HookError, RegistrationError
from commhub.testing import assert_equal_across_ranks, batches, bitwise_equal, mlp
from commhub.testing._faults import Lost, faults
from commhub.training.steps._rounds import Rounds

STEPS, FAILING = 6, 3
EVERY = "COMMHUB_EVERY_CHECK" in os.environ


def adam(parameters):
    return torch.optim.Adam(parameters, lr=0.01)


def momentum(parameters):
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def zero(parameters):
    return ZeroRedundancyOptimizer(parameters, torch.optim.Adam, lr=0.01)


def made(hook, make, dtype=torch.float32, timeout=20.0):
    model = DistributedDataParallel(mlp().to(dtype), bucket_cap_mb=1e-6)
    optimizer = make(model.parameters())
    return model, optimizer, commhub.register(model, hook, optimizer=optimizer, timeout=timeout)


def step(model, optimizer, number):
    optimizer.zero_grad()
    (x,) = batches(8)(dist.get_rank(), number)
    model(x.to(next(model.parameters()).dtype)).square().mean().backward()
    optimizer.step()


def everything(model, optimizer):
    local = getattr(optimizer, "optim", optimizer)
    state = [local.state[p] for group in local.param_groups for p in group["params"]]
    values = [torch.as_tensor(table[key]) for table in state for key in sorted(table)]
    return [value.detach().clone() for value in (*model.parameters(), *values)]


def without_failure(hook, make):
    """What training ends with, and how many collectives have been launched before and in the step that is to fail."""
    with faults({}) as drivers:
        model, optimizer, _ = made(hook, make)
    launched = []
    for number in range(STEPS):
        launched.append(drivers[0].launched)
        step(model, optimizer, number)
    return everything(model, optimizer), launched[FAILING], launched[FAILING + 1]


@contextlib.contextmanager
def raising(index):
    """The hooks raise when they have stepped one bucket."""

    def failing(reduce):
        def reduce_and_fail(self, bucket):
            yield from reduce(self, bucket)
            if (bucket.step, bucket.index) == (FAILING, index):
                raise ArithmeticError("planned")

        return reduce_and_fail

    with contextlib.ExitStack() as both:
        for kind in (OptimizerOverlap, ZeroOverlap):
            both.enter_context(patch.object(kind, "reduce", failing(kind.reduce)))
        yield


@contextlib.contextmanager
def interrupted(after):
    """A Ctrl-C when this rank hears from its peers whether the step ended well, or before it has told them."""
    confirm, left = Rounds.confirm, [FAILING]

    def confirm_and_stop(self, groups, step, **given):
        if after or (step, left) != (FAILING, [FAILING]):
            confirm(self, groups, step, **given)
        if step == FAILING and left:
            left.clear()
            raise KeyboardInterrupt

    with patch.object(Rounds, "confirm", confirm_and_stop):
        yield


@contextlib.contextmanager
def failing(kind, place, rank):
    """A failure on one rank: the hook raises in a bucket, a collective is lost, or a Ctrl-C comes."""
    here = rank == dist.get_rank()
    lost = faults({place: Lost()} if here and kind == "lost" else {})
    ways = {"raised": raising, "interrupted": interrupted}
    with ways[kind](place) if here and kind in ways else contextlib.nullcontext():
        yield lost


def swapped(registration, hook):
    """Swap when all ranks have come: who was interrupted comes long before its peers have given up."""
    for _ in range(5):
        with contextlib.suppress(RegistrationError):
            return registration.swap(hook)
    raise AssertionError("the ranks did not meet")


def resumed(hook, make, kind, place, rank, dtype=torch.float32):
    """Train with a failure, and after it go on with the step that is due, under another driver."""
    with contextlib.ExitStack() as broken:
        with broken.enter_context(failing(kind, place, rank)):
            model, optimizer, registration = made(hook, make, dtype, timeout=0.5)
        errors = 0
        while registration.step < STEPS:
            try:
                step(model, optimizer, registration.step)
            except (HookError, KeyboardInterrupt):
                errors += 1
                broken.close()
                swapped(registration, hook)
    assert errors == 1, f"{kind} {place} of rank {rank}: {errors} errors"
    return everything(model, optimizer)


def places(first, end, kinds):
    """Every collective of a step, and every bucket of it."""
    every = {"lost": range(first, end), "raised": range(4), "interrupted": (False, True)}
    return [(kind, place) for kind in kinds for place in every[kind]]


def as_without(hook, make, kinds, last=None):
    """Fail everywhere in a step, or at the ``last`` collectives only, on one rank and on another."""
    expected, first, end = without_failure(hook, make)
    for number, (kind, place) in enumerate(places(first if last is None else end - last, end, kinds)):
        for rank in range(dist.get_world_size()) if EVERY else [number % dist.get_world_size()]:
            found = resumed(hook, make, kind, place, rank)
            wrong = [i for i, (a, b) in enumerate(zip(found, expected, strict=True)) if not bitwise_equal(a, b)]
            assert not wrong, f"{kind} {place} of rank {rank}: tensors {wrong} are not as without a failure"


KINDS = {
    "adam": ("optimizer_overlap", adam, ["lost", "raised", *["interrupted"] * EVERY], None),
    "momentum": ("optimizer_overlap(inner=fp16)", momentum, ["lost"], None if EVERY else 1),
    "zero": ("zero_overlap", zero, ["lost", "raised", "interrupted"], None if EVERY else 3),
    "zero, stepwise": ("zero_overlap(mode=stepwise)", zero, ["lost"], None if EVERY else 1),
    "plain": ("allreduce", adam, ["lost", "interrupted"], None if EVERY else 2),
}


@pytest.mark.parametrize("nproc", [2, 3] if EVERY else [2])
@pytest.mark.parametrize("kind", KINDS)
def test_training_goes_on_after_a_failure_as_if_there_had_been_none(ranks, nproc, kind):
    ranks(as_without, nproc, *KINDS[kind], timeout=500)


def alike(hook, make, dtype):
    _, first, end = without_failure(hook, make)
    for place in range(first, end) if EVERY else (first + 1, end - 1):
        assert_equal_across_ranks(resumed(hook, make, "lost", place, place % 2, dtype))


@pytest.mark.parametrize("options", ["undo=false", "master=true, reduce_dtype=fp32"])
def test_ranks_are_alike_after_a_failure_where_what_was_done_is_not_known_exactly(ranks, options):
    ranks(alike, 2, f"optimizer_overlap({options})", momentum, torch.bfloat16 if "master" in options else torch.float32)


def registered_again():
    """A rank that cannot have ended the step takes it back at once; the others when they hear of that."""
    _, first, _ = without_failure("optimizer_overlap", adam)
    with faults({first + 2: Lost()} if dist.get_rank() == 1 else {}):
        model, optimizer, _ = made("optimizer_overlap", adam, timeout=0.5)
    for number in range(FAILING):
        step(model, optimizer, number)
    before = everything(model, optimizer)
    with pytest.raises(HookError):
        step(model, optimizer, FAILING)
    if dist.get_rank() == 1:
        assert all(map(bitwise_equal, everything(model, optimizer), before))
    commhub.register(model, "allreduce", optimizer=optimizer)
    assert all(map(bitwise_equal, everything(model, optimizer), before))
    step(model, optimizer, FAILING)
    assert_equal_across_ranks(everything(model, optimizer))


def test_what_a_failed_step_has_updated_is_taken_back_before_another_hook_is_at_work(ranks):
    ranks(registered_again, 2)
