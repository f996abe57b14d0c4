"""Error feedback: bounded where ranks pull apart, none for what is sent exactly, and right in the long run."""

import pytest
import torch
import torch.distributed as dist

import commhub

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


def assert_bounded(norms, size, which):
    assert 0 < max(norms) < 50 * size, f"{which}: {norms} for gradients of {size}"
    assert norms[-1] < 2 * max(norms[:5]), f"{which}: {norms}"


@pytest.mark.parametrize("nproc", [2, 4])
def test_residuals_stay_bounded_under_opposite_gradients(ranks, nproc):
    steps, caps = 100 if EVERYTHING else 50, (ONE, MANY) if EVERYTHING or nproc == 2 else (ONE,)
    hooks = FEEDING_BACK if MANY in caps else one_of_each_factory(FEEDING_BACK)
    for norms, size in ranks(opposite, nproc, hooks, caps, steps, timeout=300):
        for which, by_time in norms.items():
            assert_bounded(by_time, size, which)


class Remembering:
    """A hook, and the largest norm of what it remembers of its own before every so many steps."""

    def __init__(self, hook, every):
        self.hook, self.every, self.norms = hook, every, []

    def prepare(self, setup):
        self.state = setup.state
        self.hook.prepare(setup)

    def reduce(self, bucket):
        if bucket.step and bucket.index == 0 and bucket.step % self.every == 0:
            tables = self.state.export("local").values()
            self.norms.append(max(float(tensor.norm()) for table in tables for tensor in table.values()))
        yield from self.hook.reduce(bucket)


# What is kept is the hook's own work: so many steps are for the simulator, where they cost a fifth.
@pytest.mark.parametrize("hook", one_of_each_factory(FEEDING_BACK))
@pytest.mark.parametrize("p", [2, 4])
def test_residuals_stay_bounded_in_the_long_run(hook, p):
    steps = 2000 if EVERYTHING else 200
    base = list(drawn(0, 0, TINY).values())
    gradients = [[g if rank % 2 == 0 else -g for g in base] for rank in range(p)]
    watched = Remembering(commhub.create(hook), steps // 10)
    for one in commhub.simulate(watched, gradients, steps=steps + 1).hooks:
        assert len(one.norms) == 10
        assert_bounded(one.norms, float(base[0].norm()), hook)


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
