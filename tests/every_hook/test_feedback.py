"""Error feedback: bounded where ranks pull apart, none for what is sent exactly, and right in the long run."""

import pytest
import torch
import torch.distributed as dist

from .matrix import (
    EVERYTHING,
    HOOKS,
    MANY,
    ONE,
    ROUNDING,
    Given,
    build,
    drawn,
    feeds_back,
    give_all,
    local_state,
    one_of_each_factory,
    true_means,
)

SMALL = {"matrix": (8, 6), "conv": (4, 3, 2, 2), "vector": (3,)}
EXACT = 10 * ROUNDING[torch.float32]  # relative to a mean that is a few times smaller than the gradients
TINY = {"matrix": (6, 4), "vector": (3,)}
FEEDING_BACK = [hook for hook in HOOKS if feeds_back(hook)]


def together(hooks, caps, shapes):
    """{(hook, cap): (model, registration)}: all of them take each step in one backward."""
    return {(hook, cap): build(hook, cap, Given(shapes)) for hook in hooks for cap in caps}


def opposite(hooks, caps, steps):
    """The norms of the residuals at ten moments; ranks' gradients cancel for ever."""
    sign = 1 if dist.get_rank() % 2 == 0 else -1
    all_of_them = together(hooks, caps, TINY)
    gradients = {name: g * sign for name, g in drawn(0, 0, TINY).items()}
    models, norms = [model for model, _ in all_of_them.values()], {which: [] for which in all_of_them}
    for step in range(1, steps + 1):
        found = give_all(models, gradients)
        if step % (steps // 10):
            continue
        for (which, (_, registration)), result in zip(all_of_them.items(), found, strict=True):
            kept = {name.removeprefix("weights."): table for name, table in local_state(registration).items()}
            for name, gradient in result.items():
                sent_exactly = name not in kept
                assert not (sent_exactly and gradient.any()), f"{which}: {name} has no residual and is not sent exactly"
            sizes = {name: max(float(tensor.norm()) for tensor in table.values()) for name, table in kept.items()}
            norms[which].append(max(sizes.values()))
    return norms, float(gradients["matrix"].norm())


# What is kept belongs to a parameter, so 2,000 steps in one bucket and a hundred in several say as much, sooner.
OPPOSITE = [(2, (ONE, MANY), 50), (4, (ONE,), 50)]
if EVERYTHING:
    OPPOSITE = [(2, (ONE,), 2000), (4, (ONE,), 2000), (2, (ONE, MANY), 100), (4, (MANY,), 100)]


@pytest.mark.parametrize(("nproc", "caps", "steps"), OPPOSITE)
def test_residuals_stay_bounded_under_opposite_gradients(ranks, nproc, caps, steps):
    hooks = FEEDING_BACK if MANY in caps else one_of_each_factory(FEEDING_BACK)
    for norms, size in ranks(opposite, nproc, hooks, caps, steps, timeout=300):
        for which, by_time in norms.items():
            assert 0 < max(by_time) < 50 * size, f"{which}: {by_time} for gradients of {size}"
            assert by_time[-1] < 2 * max(by_time[:5]), f"{which}: {by_time}"


def constant(caps, steps):
    """The relative error of the mean result over the first step, a tenth of the steps, and all."""
    all_of_them = together(FEEDING_BACK, caps, SMALL)
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
            unsent = local_state(registration).get(f"weights.{name}", {})
            if first > EXACT:
                assert every <= max(first, some) / 4, where
                assert every < 0.1, where
            else:
                assert max(some, every) <= EXACT, where
                largest = max((float(tensor.abs().max()) for tensor in unsent.values()), default=0.0)
                assert largest <= EXACT, f"{where}, sent exactly, and yet {largest:.2g} is kept of it"
            assert unsent or first <= EXACT, f"{where}, and nothing is kept of it"


# Without feedback each step keeps its promise, and so does their average.
@pytest.mark.parametrize(("nproc", "caps"), [(2, (ONE, MANY)), *([(4, (MANY,))] if EVERYTHING else [])])
def test_gradients_that_never_change_give_their_mean_on_average(ranks, nproc, caps):
    ranks(constant, nproc, caps, 100)
