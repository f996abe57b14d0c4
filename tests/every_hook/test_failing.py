"""What goes wrong with any hook: one clear error on every rank, and a model that trains on."""

import itertools
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

import commhub
from commhub.testing import assert_equal_across_ranks, bitwise_equal

from .matrix import (
    BUCKETS,
    EVERYTHING,
    HOOKS,
    MANY,
    ONE,
    build,
    collectives,
    drawn,
    give,
    name_of,
    on_ranks,
    register,
    results,
    spec_of,
)


def usable(model, hook, where):
    """The model trains with `hook` as if nothing had been: like a new one, bit by bit, once buckets are the same."""
    twin, _ = build(hook, model.bucket_bytes_cap / 2**20)
    for step in range(3):
        own = drawn(dist.get_rank(), step)
        found, expected = give(model, own), give(twin, own)
    for name, tensor in found.items():
        assert bitwise_equal(tensor, expected[name]), f"{where}: {name}"


def refused(model, hook, options):
    """The error of registering; TypeError and the like are no answer."""
    try:
        register(model, hook, **options)
    except commhub.CommhubError as error:
        return error
    raise AssertionError(f"{hook} with {options} was accepted")


def other_value(option, value):
    """Another value that the option may have, or None where its kind tells of none."""
    if option.choices:
        return next(choice for choice in option.choices if choice != value)
    if option.type is bool:
        return not value
    return value + 1 if option.type in (int, float) and value is not None else None


def bad_options(hook):
    rank, last, spec = dist.get_rank(), dist.get_world_size() - 1, spec_of(hook)
    name = name_of(hook)
    bad = {"no_such_option": 1, "wire": "no such dtype"}
    bad |= {option.name: object() for option in spec.options}
    bad |= spec.preset  # what a name presets cannot be given at all
    for buckets, cap in BUCKETS.items():
        model, _ = build(None, cap)
        # A registration is refused before there are buckets, so that one option stands for all.
        for option, value in bad.items() if cap == MANY else [("wire", bad["wire"])]:
            where = f"{hook}, {buckets}, {option}={value!r}"
            error = refused(model, name, {option: value})
            assert isinstance(error, commhub.HookOptionError), f"{where}: {error!r}"
            assert option in str(error), f"{where}: {error}"
            error = refused(model, name, {option: value} if rank == last else {})
            told = commhub.HookOptionError if rank == last else commhub.RegistrationError
            assert isinstance(error, told), f"{where} on rank {last} only: {error!r}"
            assert rank == last or (f"rank {last}" in str(error) and option in str(error)), f"{where}: {error}"
            assert commhub.registration(model) is None, where
        register(model, hook)
        usable(model, hook, f"{hook}, {buckets}")


@on_ranks()
def test_a_bad_option_raises_at_register_on_all_ranks_and_leaves_no_trace(ranks, hook, nproc):
    ranks(bad_options, nproc, hook)


def different(hook):
    rank, last = dist.get_rank(), dist.get_world_size() - 1
    name = name_of(hook)
    for buckets, cap in BUCKETS.items():
        model, registration = build(hook, cap)
        options = registration.options
        odd = {option.name: other_value(option, options[option.name]) for option in spec_of(hook).options}
        odd = {key: value for key, value in odd.items() if value is not None and key not in spec_of(hook).preset}
        differing = {key: (name, {key: value}, name) for key, value in odd.items() if f"{key}=" not in hook}
        other = HOOKS[HOOKS.index(hook) - 1]
        differing |= {f"hook {other}": (other, {}, hook), "wire": (hook, {"wire": "bf16"}, hook)}
        if cap == ONE:  # they are compared before there are buckets, so that one difference stands for all
            differing = {"wire": differing["wire"]}
        for what, (odd_hook, odd_options, usual) in differing.items():
            where = f"{hook}, {buckets}: {what} differs on rank {last}"
            mine = (odd_hook, odd_options) if rank == last else (usual, {})
            error = refused(model, *mine)
            assert isinstance(error, commhub.HookMismatchError), f"{where}: {error!r}"
            assert what.split()[0] in str(error), f"{where}: {error}"
            assert f"rank {last}" in str(error), f"{where}: {error}"
        assert commhub.registration(model) is registration, f"{hook}, {buckets}: the former registration is gone"
        usable(model, hook, f"{hook}, {buckets}")


@on_ranks()
def test_a_rank_that_differs_is_named_on_every_rank_and_the_former_hook_stays(ranks, hook, nproc):
    ranks(different, nproc, hook)


MODES = {"plain": {}, "unused": {"find_unused_parameters": True}, "static": {"static_graph": True}}


def faulty(reduce, step, first):
    """A hook's `reduce` that in one step raises before its first collective, or before its second."""

    def failing(self, bucket):
        exchange, answer = reduce(self, bucket), None
        if bucket.step == step and first:
            raise ZeroDivisionError("planned")
        for number in itertools.count():
            try:
                request = exchange.send(answer)
            except StopIteration:
                return
            if bucket.step == step and number == 1:
                raise ZeroDivisionError("planned")
            answer = yield request

    return failing


def one_rank_fails(hook, mode, buckets, step, first):
    rank, last = dist.get_rank(), dist.get_world_size() - 1
    where = f"{hook}, {buckets}, {mode}, before its {'first' if first else 'second'} collective"
    model, registration = build(hook, BUCKETS[buckets], **MODES[mode])
    kind = type(registration.hook)
    broken = faulty(kind.reduce, step, first) if rank == last else kind.reduce
    told = None
    with patch.object(kind, "reduce", broken):
        for at in range(step + 1):
            assert told is None, f"{where}: failed early, {told}"
            try:
                give(model, drawn(rank, at))
            except commhub.HookError as error:
                told = error
    if collectives(hook) or rank == last:  # who waits for nobody learns of nobody's failure
        assert told is not None, f"{where}: no error on rank {rank}"
        for part in (name_of(hook), f"rank {last}"):
            assert part in str(told), f"{where}: {part!r} is missing from {told}"
        assert str(told).endswith("ZeroDivisionError: planned"), f"{where}: {told}"
    if rank == last:
        assert isinstance(told.__cause__, ZeroDivisionError), where
    for after in (hook, "allreduce"):
        registration.swap(after)
        for at in range(2):
            give(model, drawn(rank, 50 + at))
        found = results(model)
        assert all(g.isfinite().all() for g in found.values()), f"{where}, then {after}"
    expected = give(build(None, BUCKETS[buckets])[0], drawn(rank, 51))
    assert_equal_across_ranks({f"{where}: {name}": g for name, g in found.items()})
    for name, g in found.items():
        torch.testing.assert_close(g, expected[name], msg=f"{where}: {name} after the swap")


# A failure takes about a second, in which peers look for a failed rank's message: no place is tried twice.
PLACES = [
    (2, "plain", "one bucket", 1),
    (2, "unused", "many buckets", 2),
    (4, "static", "one bucket", 1),
    (4, "plain", "many buckets", 2),
]
FAULTS = list(itertools.product(HOOKS, PLACES))
if not EVERYTHING:  # each hook at one place, each place with several hooks
    FAULTS = list(zip(HOOKS, itertools.cycle(PLACES), strict=False))


@pytest.mark.parametrize(("hook", "nproc", "mode", "buckets", "place"), [(h, *place) for h, place in FAULTS])
def test_a_fault_on_one_rank_is_raised_on_all_and_training_goes_on_after_a_swap(
    ranks, hook, nproc, mode, buckets, place
):
    step = 0 if mode == "static" else 2  # static_graph's first step is the one that takes another way
    ranks(one_rank_fails, nproc, hook, mode, buckets, step, place > collectives(hook) or place == 1)
