"""More than one power iteration a step: closer to the mean, for two more messages each."""

import math

import pytest
import torch
from commhub_powersgd import PowerSGD
from commhub_powersgd._layout import Matrix
from commhub_powersgd._random import Source

import commhub

SHAPES = [(40, 30), (7,), (12, 8, 3, 3), (25, 60), ()]


def gradients(rank, step):
    generator = torch.Generator().manual_seed(1000 * rank + step)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


class Reference:
    """Subspace iteration on the ranks' matrices, plainly in float64: orthogonalise both factors in between."""

    def __init__(self, ranks, rank, iterations):
        self.ranks, self.rank, self.iterations = ranks, rank, iterations
        self.q, self.residuals = {}, {}

    def step(self, gradients):
        return [self.average(i, [mine[i].double() for mine in gradients]) for i in range(len(SHAPES))]

    def average(self, i, tensors):
        if len(SHAPES[i]) < 2:
            return sum(tensors) / self.ranks
        n, m = SHAPES[i][0], math.prod(SHAPES[i][1:])
        start = Source(0, torch.device("cpu")).factor(Matrix(str(i), n, m, self.rank), torch.float32).T.double()
        q = self.q.get(i, start)
        residuals = self.residuals.get(i, [torch.zeros(n, m, dtype=torch.float64)] * self.ranks)
        given = [g.reshape(n, m) + e for g, e in zip(tensors, residuals, strict=True)]
        for iteration in range(self.iterations):
            if iteration:
                q = torch.linalg.qr(q).Q
            p = torch.linalg.qr(sum(g @ q for g in given) / self.ranks).Q
            own = [g.T @ p for g in given]
            q = sum(own) / self.ranks
        self.residuals[i] = [g - p @ o.T for g, o in zip(given, own, strict=True)]
        self.q[i] = q
        return (p @ q.T).reshape(SHAPES[i])


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("rank", [1, 2, 4])
@pytest.mark.parametrize("iterations", [1, 2, 3])
def test_iterations_are_subspace_iterations(ranks, rank, iterations):
    reference = Reference(ranks, rank, iterations)
    for step in range(4):
        expected = reference.step([gradients(r, step) for r in range(ranks)])
    result = commhub.simulate(
        "powersgd", gradients, ranks=ranks, steps=4, rank=rank, start_step=0, num_power_iterations=iterations
    )
    for mine in result.gradients:
        for got, want in zip(mine, expected, strict=True):
            torch.testing.assert_close(got.double(), want, rtol=1e-3, atol=1e-4)
    for r, state in enumerate(result.states):
        for i, residuals in reference.residuals.items():
            got = state.local(str(i))["residual"].double().reshape(residuals[r].shape)
            torch.testing.assert_close(got, residuals[r], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("batched", [False, True])
def test_the_error_falls_with_the_iterations(batched):
    """Towards the best approximation of that rank, on a matrix whose singular values halve."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(n, 30, generator=generator)).Q for n in (60, 40))
    mean = left @ torch.diag(0.5 ** torch.arange(30.0)) @ right.T
    best = float((0.5 ** torch.arange(2, 30.0)).norm())
    errors = []
    for iterations in (1, 2, 3, 5):
        options = {"start_step": 0, "num_power_iterations": iterations, "batch_same_shapes": batched}
        result = commhub.simulate("powersgd_rank2", [[mean, mean]] * 2, **options)
        errors.append(float((result.gradients[0][0] - mean).norm()))
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 1.1 * best
    assert errors[-1] == pytest.approx(best, rel=1e-3)


@pytest.mark.parametrize("p", [2, 4])
@pytest.mark.parametrize("iterations", [1, 2, 4])
def test_sent_bytes_follow_the_formula(p, iterations):
    ones = [torch.ones(shape) for shape in [(40, 30), (9,), (50, 50)]]
    options = {"rank": 2, "start_step": 0, "buckets": 2, "num_power_iterations": iterations}
    result = commhub.simulate("powersgd", [ones] * p, steps=3, **options)
    each = iterations * 2 * (70 + 100) + 9
    assert result.sent_bytes == pytest.approx((2 * (p - 1) / p * 4 * 3 * each,) * p)
    assert result.hooks[0].compression_stats()[1:] == (3 * (1200 + 9 + 2500), 3 * each)


@pytest.mark.parametrize("iterations", [2, 3])
@pytest.mark.parametrize("rank", [1, 2, 4])
def test_zero_stays_zero_and_a_lower_rank_is_reproduced(iterations, rank):
    generator = torch.Generator().manual_seed(rank)
    flat = torch.randn(40, 1, generator=generator) @ torch.randn(1, 30, generator=generator)
    options = {"start_step": 0, "rank": rank, "num_power_iterations": iterations, "min_compression_rate": 0.5}
    for steps in (1, 2, 20):
        result = commhub.simulate("powersgd", [[torch.zeros(40, 30), flat]] * 2, steps=steps, **options)
        assert result.gradients[0][0].count_nonzero() == 0
        torch.testing.assert_close(result.gradients[0][1], flat, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_tiny_and_huge_gradients_are_no_different(scale):
    generator = torch.Generator().manual_seed(3)
    mean = torch.randn(40, 2, generator=generator) @ torch.randn(2, 30, generator=generator) * scale
    result = commhub.simulate("powersgd_rank2", [[mean]] * 2, start_step=0, num_power_iterations=3)
    assert (result.gradients[0][0] - mean).double().norm() < 1e-5 * mean.double().norm()


@pytest.mark.parametrize("options", [{}, {"error_feedback": False, "warm_start": False}], ids=["state", "stateless"])
def test_the_step_after_a_non_finite_one_is_clean(options):
    def spoiled(rank, step):
        made = gradients(rank, step)
        if (rank, step) == (1, 1):
            made[0][3, 4] = math.inf
        return made

    options = {"ranks": 2, "start_step": 0, "num_power_iterations": 3, **options}
    first, second, third = (commhub.simulate("powersgd_rank2", spoiled, steps=n, **options) for n in (1, 2, 3))
    for mine in second.gradients:
        assert not mine[0].isfinite().any()
    for mine in third.gradients:
        assert all(g.isfinite().all() for g in mine)
    for before, after in zip(first.states, second.states, strict=True):
        for scope in ("local", "shared"):
            kept, left = before.export(scope), after.export(scope)
            assert kept.keys() == left.keys()
            assert all(torch.equal(kept[n][k], left[n][k]) for n in kept for k in kept[n])


def test_less_than_one_iteration_is_refused():
    with pytest.raises(ValueError, match="num_power_iterations is 0; it must be at least 1"):
        PowerSGD(num_power_iterations=0)
