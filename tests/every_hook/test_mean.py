"""The result of a step: identical on all ranks, as near to the mean as the hook promises, like the parameter."""

import torch
import torch.distributed as dist

from commhub.testing import EveryKind, assert_equal_across_ranks, bitwise_equal

from .matrix import (
    BUCKETS,
    HOOKS,
    MANY,
    agrees,
    assert_mean,
    build,
    drawn,
    give,
    on_ranks,
    promised_error,
    results,
    spec_of,
)

MODES = ({}, {"static_graph": True}, {"find_unused_parameters": True})


def every_kind(hook):
    rank = dist.get_rank()
    for buckets, cap in BUCKETS.items():
        for mode in MODES if cap == MANY else MODES[:1]:
            bare = build(None, cap, EveryKind(), **mode)[0] if spec_of(hook).exact else None
            model, registration = build(hook, cap, EveryKind(), **mode)
            alone = EveryKind()
            for step in range(3):
                where = f"{hook}, {buckets}, {mode}, step {step}"
                for module in filter(None, (alone, bare, model)):
                    module.zero_grad()
                    module(*EveryKind.batch(rank, step)).backward()
                own = {name: q.grad for name, q in alone.named_parameters()}
                found = results(model)
                plain = results(bare) if spec_of(hook).exact else None
                for name, mine in own.items():
                    got = found[name]
                    same_kind = (mine.dtype, mine.shape, mine.is_sparse)
                    assert (got.dtype, got.shape, got.is_sparse) == same_kind, f"{where}: {name}"
                    if not got.is_sparse:
                        assert got.stride() == mine.stride(), f"{where}: {name} has lost its strides"
                    assert not plain or bitwise_equal(got, plain[name]), f"{where}: {name} is not what DDP makes of it"
                if agrees(hook):
                    assert_equal_across_ranks({f"{where}: {name}": g for name, g in found.items()})
                    assert_mean(hook, registration, found, own, where)
                else:
                    kept = [name for name, g in own.items() if g.is_sparse or bitwise_equal(found[name], g)]
                    assert kept == list(own), where


@on_ranks()
def test_every_kind_of_parameter_has_the_result_that_the_hook_promises(ranks, hook, nproc):
    ranks(every_kind, nproc, hook)


def normal_and_huge(hook):
    rank = dist.get_rank()
    for buckets, cap in BUCKETS.items():
        model, registration = build(hook, cap)
        for step in range(5):
            where = f"{hook}, {buckets}, step {step}"
            own = drawn(rank, step)
            found = give(model, own)
            assert_equal_across_ranks({f"{where}: {name}": g for name, g in found.items()})
            assert_mean(hook, registration, found, own, where)
        where = f"{hook}, {buckets}, a gradient above float16's range on one rank, whose mean is inside"
        own = {name: torch.full_like(g, 1e5 if rank == 0 else 0.0) for name, g in own.items()}
        assert_mean(hook, registration, give(model, own), own, where)


@on_ranks(agrees)
def test_normal_and_huge_gradients_average_alike_on_all_ranks(ranks, hook, nproc):
    ranks(normal_and_huge, nproc, hook)


def like_bare(hook):
    for buckets, cap in BUCKETS.items():
        (bare, _), (model, _) = build(None, cap), build(hook, cap)
        for step in range(6):
            own = drawn(dist.get_rank(), step)
            expected, found = give(bare, own), give(model, own)
            for name in own:
                assert bitwise_equal(found[name], expected[name]), f"{hook}, {buckets}, step {step}: {name}"


@on_ranks(lambda hook: spec_of(hook).exact)
def test_an_exact_hook_is_bit_equal_to_ddp_without_one(ranks, hook, nproc):
    ranks(like_bare, nproc, hook)


def untouched(hook):
    for buckets, cap in BUCKETS.items():
        torch.manual_seed(7)
        before = torch.get_rng_state()
        model, registration = build(hook, cap)
        for step in range(3):
            give(model, drawn(dist.get_rank(), step))
        registration.load_state_dict(registration.state_dict())
        registration.swap("allreduce")
        give(model, drawn(dist.get_rank(), 3))
        registration.remove()
        assert bitwise_equal(torch.get_rng_state(), before), f"{hook}, {buckets}"


@on_ranks()
def test_the_global_random_generator_is_left_alone(ranks, hook, nproc):
    ranks(untouched, nproc, hook)


def test_some_promise_is_tight_so_that_the_tests_above_compare_something():
    promised = [promised_error(hook, torch.float32) for hook in HOOKS]
    assert min(filter(None, promised)) == 1e-6
    assert all(bound is None or bound < 0.05 for bound in promised)
