"""An error on one rank alone while a hook is registered by DDP's own method: all ranks hear of it at once."""

import datetime
import gc
import time

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import commhub
from commhub.testing import batches, bitwise_equal

ONE, MANY = 25, 0.0005  # bucket caps in MiB
TIMEOUT, AT_ONCE = 30, 5  # seconds: the groups' own, and what ranks need at most that wait for none


class State:
    """What is wrong on this rank: before it registers, as it does, or afterwards."""

    def __init__(self, before=None, given="allreduce", after=None, group=None):
        self.before, self.given, self.after, self.group, self.calls = before, given, after, group, 0

    def mend(self):
        self.before = self.after = None
        self.given = "allreduce"


@commhub.comm_hook
def picky(model, state):
    state.calls += 1
    if state.before is not None:
        raise state.before
    commhub.register(
        model.module if state.given == "no ddp" else model,
        "allreduce" if state.given == "no ddp" else state.given,
        process_group=state.group,
    )
    if state.after is not None:
        raise state.after


def layers():
    torch.manual_seed(1)
    return nn.Sequential(*[nn.Linear(8, 8) for _ in range(12)])


def wrapped(cap=ONE, **modes):
    group = dist.new_group(timeout=datetime.timedelta(seconds=TIMEOUT))
    return DistributedDataParallel(layers(), process_group=group, bucket_cap_mb=cap, **modes)


def trained(model, steps=3):
    """The gradients after each of some steps."""
    gradients = []
    for number in range(steps):
        model.zero_grad()
        model(batches(8)(dist.get_rank(), number)[0]).square().mean().backward()
        gradients.append({name: p.grad.clone() for name, p in model.module.named_parameters()})
    return gradients


def equal(a, b):
    return all(bitwise_equal(x[name], y[name]) for x, y in zip(a, b, strict=True) for name in x)


def all_raise(model, errors):
    """One backward raises at once: ``errors``, by rank, there, and elsewhere what names the first of these ranks."""
    first, rank = min(errors), dist.get_rank()
    dist.barrier()
    start = time.monotonic()
    if rank in errors:
        kind, text = errors[rank]
        with pytest.raises(kind, match=text) as caught:
            trained(model, 1)
    else:
        told = f"rank {first} could not go on: .*{errors[first][1]}"
        with pytest.raises(commhub.RegistrationError, match=told) as caught:
            trained(model, 1)
    took = time.monotonic() - start
    assert took < AT_ONCE, took
    notes = getattr(caught.value, "__notes__", [])
    assert len(notes) == len(set(notes))
    assert not any(note in str(caught.value) for note in notes)
    assert commhub.registration(model) is None


def as_without_a_hook(cap=ONE, **modes):
    """The gradients of a model that had a backward before, as ours has: DDP lays out its buckets anew after one."""
    model = wrapped(cap, **modes)
    trained(model, 1)
    return trained(model)


def goes_on(model, state, cap=ONE, **modes):
    """The next backward tries again, in vain or not; what comes is as without a hook, and removing it leaves that."""
    calls = state.calls
    state.mend()
    reference = as_without_a_hook(cap, **modes)
    assert equal(trained(model), reference)
    assert state.calls == calls + 1
    registration = commhub.registration(model)
    assert (str(registration), registration.step) == ("allreduce", 3)
    registration.remove()
    assert equal(trained(model), reference)


def before_it_registers(faulty, cap, modes):
    state = State(before=KeyError("no such state") if dist.get_rank() == faulty else None)
    model = wrapped(cap, **modes)
    model.register_comm_hook(state, picky)
    for _ in range(2):
        all_raise(model, {faulty: (KeyError, "no such state")})
    goes_on(model, state, cap, **modes)


@pytest.mark.parametrize("cap", [ONE, MANY], ids=["one bucket", "twelve buckets"])
@pytest.mark.parametrize(("nproc", "faulty"), [(2, 0), (2, 1), (3, 0), (3, 2), (4, 0), (4, 3)])
def test_an_error_before_one_rank_registers_is_told_to_all(ranks, nproc, faulty, cap):
    ranks(before_it_registers, nproc, faulty, cap, {})


@pytest.mark.parametrize(
    "modes",
    [{"static_graph": True}, {"find_unused_parameters": True}, {"gradient_as_bucket_view": True}],
    ids=["static", "unused", "views"],
)
def test_it_is_so_in_ddp_s_other_modes(ranks, modes):
    ranks(before_it_registers, 2, 1, MANY, modes)


def with_one_rank(make, faulty, kind, text):
    state = make() if dist.get_rank() == faulty else State()
    model = wrapped()
    model.register_comm_hook(state, picky)
    all_raise(model, {faulty: (kind, text)})
    goes_on(model, state)


def raises_afterwards():
    return State(after=FloatingPointError("no luck"))


def knows_no_such_hook():
    return State(given="no_such_hook")


def gives_no_ddp_model():
    return State(given="no ddp")


@pytest.mark.parametrize("faulty", [0, 2])
@pytest.mark.parametrize(
    ("make", "kind", "text"),
    [
        (raises_afterwards, FloatingPointError, "no luck"),
        (knows_no_such_hook, commhub.UnknownHookError, "no_such_hook"),
        (gives_no_ddp_model, commhub.RegistrationError, "no DistributedDataParallel model"),
    ],
)
def test_an_error_as_one_rank_registers_or_afterwards_is_told_to_all_and_leaves_no_hook(
    ranks, make, kind, text, faulty
):
    ranks(with_one_rank, 3, make, faulty, kind, text)


def several_errors(count):
    """On ``count`` ranks, each its own."""
    rank = dist.get_rank()
    state = State(before=KeyError(f"error {rank}") if rank < count else None)
    model = wrapped(MANY)
    model.register_comm_hook(state, picky)
    all_raise(model, {number: (KeyError, f"error {number}") for number in range(count)})
    goes_on(model, state, MANY)


@pytest.mark.parametrize("count", [2, 3])
def test_each_of_several_ranks_has_its_own_error(ranks, count):
    ranks(several_errors, 3, count)


def within_groups():
    """The hook averages in pairs of ranks; an error in one of them is every rank's."""
    rank = dist.get_rank()
    pairs = [dist.new_group(ranks, timeout=datetime.timedelta(seconds=TIMEOUT)) for ranks in ([0, 1], [2, 3])]
    for state in (
        State(group=pairs[rank // 2], before=KeyError("no luck") if rank == 3 else None),
        State(group=pairs[rank // 2], given="no luck" if rank == 3 else "allreduce"),
    ):
        model = wrapped()
        model.register_comm_hook(state, picky)
        dist.barrier()
        start = time.monotonic()
        with pytest.raises((commhub.CommhubError, KeyError), match="no luck"):
            trained(model, 1)
        assert time.monotonic() - start < AT_ONCE
        assert commhub.registration(model) is None
        state.mend()
        halves = trained(DistributedDataParallel(layers(), process_group=pairs[rank // 2]))
        assert equal(trained(model), halves)


def test_ranks_that_average_within_groups_of_their_own_hear_of_it_too(ranks):
    ranks(within_groups, 4)


def another_hook_instead(faulty):
    state = State(before=KeyError("no luck") if dist.get_rank() == faulty else None)
    model = wrapped(MANY)
    model.register_comm_hook(state, picky)
    all_raise(model, {faulty: (KeyError, "no luck")})
    registration = commhub.register(model, "allreduce")
    assert equal(trained(model), as_without_a_hook(MANY))
    assert (registration.step, state.calls) == (3, 1)


def test_another_hook_may_be_registered_instead(ranks):
    ranks(another_hook_instead, 2, 1)


def one_swallows_it(faulty):
    """It catches its own error, and registers nothing."""

    @commhub.comm_hook
    def swallowing(model, state):
        try:
            commhub.register(model if dist.get_rank() != faulty else 7, "allreduce")
        except commhub.RegistrationError:
            if dist.get_rank() != faulty:
                raise

    model = wrapped()
    model.register_comm_hook(None, swallowing)
    all_raise(model, {faulty: (commhub.RegistrationError, "swallowing has registered no hook")})


def test_a_rank_that_registers_nothing_is_named(ranks):
    ranks(one_swallows_it, 2, 1)


def left_over(faulty):
    """A former model on one rank, not yet collected: whose bucket this is cannot be told there."""
    gc.disable()
    try:
        state, net = State(), layers()
        group = dist.new_group(timeout=datetime.timedelta(seconds=TIMEOUT))
        models = [DistributedDataParallel(net, process_group=group) for _ in range(2)]
        for model in models[: 2 if dist.get_rank() == faulty else 1]:
            model.register_comm_hook(state, picky)
        model, loop = models[0], [models.pop()]
        loop.append(loop)
        del loop
        all_raise(model, {faulty: (commhub.RegistrationError, "2 DDP models hold the parameters")})
        goes_on(model, state)
    finally:
        gc.enable()


@pytest.mark.parametrize("faulty", [0, 1])
def test_a_rank_that_cannot_tell_its_model_says_so(ranks, faulty):
    ranks(left_over, 2, faulty)


def of_a_joined_rank(faulty):
    """Rank 0 has no input: it begins with another's, and has the error or hears of it."""
    rank = dist.get_rank()
    model, state = wrapped(), State(before=KeyError("no luck") if rank == faulty else None)
    model.register_comm_hook(state, picky)

    def joined():
        with model.join():
            trained(model, 3 * rank)

    dist.barrier()
    start = time.monotonic()
    with pytest.raises((KeyError, commhub.RegistrationError), match="no luck"):
        joined()
    assert time.monotonic() - start < AT_ONCE


@pytest.mark.parametrize("faulty", [0, 1])
def test_it_is_told_among_ranks_that_have_joined(ranks, faulty):
    ranks(of_a_joined_rank, 2, faulty)
