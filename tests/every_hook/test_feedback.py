"""Error feedback: bounded where ranks pull apart, none for what is sent exactly, and right in the long run."""

import pytest
import torch
import torch.distributed as dist

from .matrix import (
    HOOKS,
    MANY,
    ONE,
    Given,
    agrees,
    build,
    drawn,
    feeds_back,
    give_all,
    local_state,
    promised_error,
    true_means,
)

SMALL = {"matrix": (8, 6), "conv": (4, 3, 2, 2), "vector": (3,)}
TINY = {"matrix": (6, 4), "vector": (3,)}
FEEDING_BACK = [hook for hook in HOOKS if feeds_back(hook)]
# The others are here to show that what each step promises holds on average too.
AVERAGING = [hook for hook in HOOKS if agrees(hook) and (feeds_back(hook) or promised_error(hook, torch.float32))]


def together(hooks, caps, shapes):
    """{(hook, cap): (model, registration)}: all of them take each step in one backward."""
    return {(hook, cap): build(hook, cap, Given(shapes)) for hook in hooks for cap in caps}


def opposite(caps, steps):
    """The norms of the residuals at ten moments; ranks' gradients cancel for ever."""
    sign = 1 if dist.get_rank() % 2 == 0 else -1
    all_of_them = together(FEEDING_BACK, caps, TINY)
    gradients = {name: g * sign for name, g in drawn(0, 0, TINY).items()}
    models, norms = [model for model, _ in all_of_them.values()], {which: [] for which in all_of_them}
    for step in range(1, steps + 1):
        found = give_all(models, gradients)
        if step % (steps // 10):
            continue
        for (which, (_, registration)), result in zip(all_of_them.items(), found, strict=True):
            assert not result["vector"].any(), f"{which}: what is sent exactly cancels, but not in step {step}"
            kept = local_state(registration)
            assert list(kept) == ["weights.matrix"], f"{which}: the vector is sent exactly, and yet has a residual"
            norms[which].append(max(float(tensor.norm()) for tensor in kept["weights.matrix"].values()))
    return norms, float(gradients["matrix"].norm())


# What is kept belongs to a parameter, so 2,000 steps in one bucket and a hundred in both say as much, sooner.
@pytest.mark.parametrize(("caps", "steps"), [((ONE,), 2000), ((ONE, MANY), 100)], ids=["long", "one and many buckets"])
@pytest.mark.parametrize("nproc", [2, 4])
def test_residuals_stay_bounded_over_2000_steps_of_opposite_gradients(ranks, nproc, caps, steps):
    for norms, size in ranks(opposite, nproc, caps, steps, timeout=180):
        for which, by_time in norms.items():
            assert 0 < max(by_time) < 50 * size, f"{which}: {by_time} for gradients of {size}"
            assert by_time[-1] < 2 * max(by_time[:5]), f"{which}: {by_time}"


def constant(steps):
    """The relative error of the mean result over the first step, a tenth of the steps, and all."""
    all_of_them = together(AVERAGING, (ONE, MANY), SMALL)
    own = drawn(dist.get_rank(), 0, SMALL)
    means = {name: mean for name, (mean, _) in true_means(own).items()}
    totals = {which: {name: torch.zeros_like(mean) for name, mean in means.items()} for which in all_of_them}
    errors = {which: {name: [] for name in own} for which in all_of_them}
    for step in range(1, steps + 1):
        for which, found in zip(all_of_them, give_all([m for m, _ in all_of_them.values()], own), strict=True):
            for name, result in found.items():
                total = totals[which][name].add_(result)
                if step in (1, steps // 10, steps):
                    errors[which][name].append(float((total / step - means[name]).norm() / means[name].norm()))
    for which, (_, registration) in all_of_them.items():
        for name, (first, some, every) in errors[which].items():
            where = f"{which}: {name} is off by {first:.2g}, {some:.2g}, {every:.2g}"
            if feeds_back(which[0]) and f"weights.{name}" in local_state(registration):
                assert every < some / 4 < first / 4, where
                assert every < 0.1, where
            else:
                bound = promised_error(which[0], torch.float32, exactly=feeds_back(which[0]))
                # Relative to the ranks' gradients, that is; their mean is a few times smaller.
                assert max(first, some, every) <= 10 * bound, where


@pytest.mark.parametrize("nproc", [2, 4])
def test_gradients_that_never_change_give_their_mean_on_average(ranks, nproc):
    ranks(constant, nproc, 100)
