"""What is not there stays away: zeros stay zero, and nothing of an Inf or a NaN outlives its step."""

import itertools

import pytest
import torch
import torch.distributed as dist

import commhub
from commhub.testing import assert_equal_across_ranks, bitwise_equal

from .matrix import BUCKETS, ONE, SHAPES, agrees, assert_mean, build, drawn, give, on_ranks, state_of

ALWAYS_ZERO = ("tall", "vector", "scalar")


def zeros(hook):
    for buckets, cap in BUCKETS.items():
        model, _ = build(hook, cap)
        for step in range(5):
            gradients = drawn(dist.get_rank(), step)
            for name in ALWAYS_ZERO:
                gradients[name] = torch.zeros_like(gradients[name])
            for name, found in give(model, gradients).items():
                where = f"{hook}, {buckets}, step {step}: {name}"
                assert bool(found.any()) == (name not in ALWAYS_ZERO), where


@on_ranks()
def test_a_gradient_that_has_always_been_zero_stays_zero(ranks, hook, nproc):
    ranks(zeros, nproc, hook)


STRUCK = {
    "a matrix": ("tall",),
    "another": ("conv",),
    "a scalar": ("scalar",),
    "a vector": ("vector",),
    "all": tuple(drawn(0, 0)),
    "all again": tuple(drawn(0, 0)),
}


def struck(gradients, names, value):
    for name in names:
        gradients[name].view(-1)[-1] = value
    return gradients


def bad_steps(hook, buckets):
    rank, last = dist.get_rank(), dist.get_world_size() - 1
    model, registration = build(hook, BUCKETS[buckets])
    step, seen = 0, {}
    for (what, names), value in zip(STRUCK.items(), itertools.cycle([float("inf"), float("nan")]), strict=False):
        where = f"{hook}, {buckets}, {value} in {what}"
        give(model, drawn(rank, step))
        step += 1
        before = state_of(registration)
        gradients = drawn(rank, step)
        found = give(model, struck(gradients, names, value) if rank == last else gradients)
        step += 1
        for name in names:
            assert not found[name].isfinite().all(), f"{where}: {name} is finite on rank {rank}"
        for key, tensor in state_of(registration).items():
            assert tensor.isfinite().all(), f"{where}: {key} is not finite"
            # What was struck kept its own; where everything was in one bucket, all was struck.
            if BUCKETS[buckets] == ONE or key.rpartition(".")[2] in names:
                assert bitwise_equal(tensor, before[key]), f"{where}: {key} has changed"
        own = drawn(rank, step)
        found = give(model, own)
        step += 1
        assert_mean(hook, registration, found, own, f"{where}, the step after")
        seen |= {f"{where}, the step after: {name}": g for name, g in found.items()}
    shared = registration.state_dict()["shared"]
    seen |= {f"{where}: {key} of {n}": t for n, table in shared.items() for key, t in table.items()}
    assert_equal_across_ranks(seen)


@on_ranks(agrees)
def test_one_rank_s_inf_or_nan_reaches_all_and_leaves_nothing_behind(ranks, hook, nproc):
    for buckets in BUCKETS:
        ranks(bad_steps, nproc, hook, buckets)


COMPRESSED = "start_step=0, min_compression_rate=0.5"
FEEDING_BACK = [
    *(
        f"{name}(bits={bits}, symmetric={symmetric}, error_feedback=true, dense_small=false{more})"
        for name in ("quantize_per_tensor", "quantize_per_channel")
        for bits, symmetric, more in (
            (8, "true", ""),
            (4, "false", ""),
            (2, "true", ", residual_dtype=bf16"),
            (4, "true", ", stochastic_rounding=true"),
        )
    ),
    *(f"{name}({COMPRESSED}, rank=2)" for name in ("powersgd", "batched_powersgd")),
    f"powersgd({COMPRESSED}, alternating=true)",
    f"powersgd({COMPRESSED}, num_power_iterations=2)",
    f"powersgd({COMPRESSED}, warm_start=false)",
]


@pytest.mark.parametrize("hook", FEEDING_BACK)
def test_a_struck_step_counts_for_nothing_in_any_mode(hook):
    for place, dtype in ((0, torch.float32), (4, torch.float32), (3, torch.float16)):

        def gradients(rank, step, place=place, dtype=dtype):
            made = [g.to(dtype) for g in drawn(rank, step).values()]
            if (rank, step) == (2, 1):
                made[place].view(-1)[-1] = float("inf")
            return made

        before, struck, after = (commhub.simulate(hook, gradients, ranks=3, steps=steps) for steps in (1, 2, 3))
        for rank in range(3):
            assert not struck.gradients[rank][place].isfinite().all(), list(SHAPES)[place]
            assert all(g.isfinite().all() for g in after.gradients[rank])
            for scope in ("local", "shared"):
                table, kept = struck.states[rank].export(scope), before.states[rank].export(scope)
                for name, entries in table.items():
                    for key, tensor in entries.items():
                        assert bitwise_equal(tensor, kept[name][key]), f"{key} of {name} on rank {rank}"
