"""A run as a whole: many buckets for many steps, and going on from a saved state with other buckets."""

import io

import pytest
import torch
import torch.distributed as dist

from commhub.testing import assert_equal_across_ranks, batches, bitwise_equal, mlp

from .matrix import (
    AS_ONE,
    EVERYTHING,
    HOOKS,
    MANY,
    ONE,
    agrees,
    build,
    collectives,
    drawn,
    feeds_back,
    give,
    on_ranks,
    one_of_each_factory,
    promised_error,
    spec_of,
    state_of,
)

PER_LAYER = 1 / 4096  # MiB


def long_runs(hooks, cap, steps):
    """Every hook on a model of its own, all in one backward, so that their exchanges meet as well."""
    rank, draw = dist.get_rank(), batches(8)
    models, registrations = zip(*(build(hook, cap, mlp([8] * 13)) for hook in hooks), strict=True)
    optimizer = torch.optim.SGD([p for model in models for p in model.parameters()], lr=0.1)
    for step in range(steps):
        optimizer.zero_grad()
        sum(model(*draw(rank, step)).square().mean() for model in models).backward()
        optimizer.step()
    told = {}
    for hook, model, registration in zip(hooks, models, registrations, strict=True):
        assert registration.step == registration.stats.steps == steps, hook
        seen = {f"{hook}: {name}": p.detach() for name, p in model.module.named_parameters()}
        assert all(p.isfinite().all() for p in seen.values()), hook
        if agrees(hook):  # all steps' gradients are in the parameters
            shared = registration.state_dict()["shared"]
            seen |= {f"{hook}: {key} of {name}": t for name, table in shared.items() for key, t in table.items()}
            assert_equal_across_ranks(seen)
        told[hook] = len(model._get_ddp_logging_data()["rebuilt_bucket_sizes"].split(","))
    return told


# On four ranks by one hook for each number of collectives that build on one another, exact or not, unless EVERYTHING.
@pytest.mark.parametrize("nproc", [2, 4])
def test_many_steps_of_twelve_buckets_end_and_ranks_agree(ranks, nproc):
    steps = 100 if EVERYTHING else 40 // nproc
    hooks = one_of_each_factory(HOOKS)
    if nproc == 4 and not EVERYTHING:
        hooks = list({(collectives(hook), spec_of(hook).tolerance is None): hook for hook in reversed(hooks)}.values())
    assert ranks(long_runs, nproc, hooks, PER_LAYER, steps, timeout=300) == [dict.fromkeys(hooks, 12)] * nproc
    assert ranks(long_runs, nproc, hooks, ONE, 10) == [dict.fromkeys(hooks, 1)] * nproc


def resumed(hook):
    for before, after in ((ONE, MANY), (MANY, ONE), (MANY, MANY)):
        resume(hook, before, after)


def resume(hook, before, after):
    rank = dist.get_rank()
    model, registration = build(hook, before)
    for step in range(4):
        give(model, drawn(rank, step))
    file = io.BytesIO()
    torch.save(registration.state_dict(), file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other, again = build(hook, after)
    for step in range(2):  # what it did before counts no more, and its buckets have been made
        give(other, drawn(rank, 50 + step))
    again.load_state_dict(saved)
    where = f"{hook}, bucket_cap_mb {before} and then {after}"
    assert again.step == 4, where
    afresh = hook in AS_ONE and before != after
    expected, found = state_of(registration), state_of(again)
    assert feeds_back(hook) == any(key.startswith("local") for key in expected), where
    assert not expected or any(tensor.any() for tensor in expected.values()), f"{where}: there is nothing to see"
    if not afresh:
        assert list(found) == list(expected), where
        for key, tensor in expected.items():
            assert bitwise_equal(found[key], tensor), f"{where}: {key}"
    for step in range(4, 6):
        whole, half = give(model, drawn(rank, step)), give(other, drawn(rank, step))
        if agrees(hook):
            assert_equal_across_ranks({f"{where}, step {step}: {name}": g for name, g in half.items()})
        for name, g in whole.items():
            if dist.get_world_size() == 2 or before == after:
                assert afresh or bitwise_equal(half[name], g), f"{where}, step {step}: {name}"
            elif not afresh:  # other buckets add more than two summands in another order
                bound = 4 * max(1e-3, promised_error(hook, g.dtype) or 0.0)
                assert (half[name] - g).norm() <= bound * g.norm(), f"{where}, step {step}: {name}"


@on_ranks()
def test_hook_state_goes_on_bit_for_bit_with_the_same_and_with_other_buckets(ranks, hook, nproc):
    ranks(resumed, nproc, hook)
