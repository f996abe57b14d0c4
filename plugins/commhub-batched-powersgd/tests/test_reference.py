"""The hook against the algorithm, written plainly in float64: the bucket as one square, then PowerSGD."""

import math

import pytest
import torch
from commhub_batched_powersgd._square import label
from commhub_powersgd import Matrix, Source

import commhub

SHAPES = [(40, 30), (7,), (12, 8, 3, 3), (3, 4), (25, 60), (), (0, 3)]
NAMES = [str(i) for i in range(len(SHAPES))]


def gradients(rank, step, shapes=SHAPES):
    generator = torch.Generator().manual_seed(1000 * rank + step)
    return [torch.randn(shape, generator=generator) for shape in shapes]


class Reference:
    """All parameters of one bucket, in the order of their names, which here is the order given."""

    def __init__(self, ranks, rank, *, error_feedback=True, warm_start=True, iterations=1):
        self.ranks, self.rank, self.iterations = ranks, rank, iterations
        self.error_feedback, self.warm_start = error_feedback, warm_start
        self.n = sum(math.prod(shape) for shape in SHAPES)
        self.side = math.ceil(math.sqrt(self.n))
        self.residuals = [torch.zeros(self.side, self.side, dtype=torch.float64)] * ranks
        self.q = None

    def step(self, step, gradients):
        given = []
        for mine, residual in zip(gradients, self.residuals, strict=True):
            square = torch.zeros(self.side**2, dtype=torch.float64)
            square[: self.n] = torch.cat([g.double().reshape(-1) for g in mine])
            given.append(square.view(self.side, self.side) + residual)
        q = self.q if self.warm_start and self.q is not None else self.start(None if self.warm_start else step)
        for iteration in range(self.iterations):
            if iteration:
                q = torch.linalg.qr(q).Q
            p = torch.linalg.qr(sum(g @ q for g in given) / self.ranks).Q
            own = [g.T @ p for g in given]
            q = sum(own) / self.ranks
        if self.error_feedback:
            left = [g - p @ o.T for g, o in zip(given, own, strict=True)]
            for square in left:
                square.view(-1)[self.n :] = 0  # no parameter's
            self.residuals = left
        self.q = q
        return self.split(p @ q.T)

    def start(self, step):
        matrix = Matrix(
            label([n for n, s in zip(NAMES, SHAPES, strict=True) if math.prod(s)]), *2 * [self.side], self.rank
        )
        return Source(0, torch.device("cpu")).factor(matrix, torch.float32, step).T.double()

    def split(self, square):
        parts = square.reshape(-1)[: self.n].split([math.prod(shape) for shape in SHAPES])
        return [part.reshape(shape) for part, shape in zip(parts, SHAPES, strict=True)]


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("rank", [1, 2, 4])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"error_feedback": False},
        {"warm_start": False},
        {"error_feedback": False, "warm_start": False},
        {"num_power_iterations": 3},
    ],
    ids=str,
)
def test_the_hook_computes_what_the_algorithm_says(ranks, rank, options):
    settings = {key.replace("num_power_", ""): value for key, value in options.items()}
    reference = Reference(ranks, rank, **settings)
    for step in range(5):
        expected = reference.step(step, [gradients(r, step) for r in range(ranks)])
    result = commhub.simulate("batched_powersgd", gradients, ranks=ranks, steps=5, rank=rank, start_step=0, **options)
    for mine in result.gradients:
        for got, want in zip(mine, expected, strict=True):
            torch.testing.assert_close(got.double(), want, rtol=1e-3, atol=1e-4)
    if reference.error_feedback:
        for state, residual in zip(result.states, reference.residuals, strict=True):
            for name, want in zip(NAMES, reference.split(residual), strict=True):
                got = state.local(name).get("residual", torch.zeros(want.shape)).double()
                torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)


def test_rank_2_is_a_preset():
    two, preset = (
        commhub.simulate(hook, gradients, ranks=2, steps=3, start_step=0)
        for hook in ("batched_powersgd(rank=2)", "batched_powersgd_rank2")
    )
    assert all(torch.equal(a, b) for a, b in zip(two.gradients[0], preset.gradients[0], strict=True))


@pytest.mark.parametrize("buckets", [1, 2, 4])
@pytest.mark.parametrize("rank", [1, 2])
def test_all_that_was_sent_and_all_that_waits_is_all_that_was_given(rank, buckets):
    """Summed over steps: outputs + mean residual = mean gradients."""
    sent = [torch.zeros(s, dtype=torch.float64) for s in SHAPES]
    given = [torch.zeros(s, dtype=torch.float64) for s in SHAPES]
    options = {"ranks": 2, "rank": rank, "start_step": 0, "buckets": buckets}
    for steps in range(1, 9):  # the simulator returns the last step only
        result = commhub.simulate("batched_powersgd", gradients, steps=steps, **options)
        for total, output in zip(sent, result.gradients[0], strict=True):
            total += output
        for r in range(2):
            for total, gradient in zip(given, gradients(r, steps - 1), strict=True):
                total += gradient.double() / 2
    for i, (total, all_given) in enumerate(zip(sent, given, strict=True)):
        waiting = [state.local(str(i)).get("residual", torch.zeros(())) for state in result.states]
        torch.testing.assert_close(total + sum(waiting).double() / 2, all_given, rtol=1e-4, atol=1e-4)


def test_the_order_of_arrival_within_a_bucket_changes_nothing():
    """Buckets hold the same names in another order after DDP has rebuilt them."""
    from commhub_batched_powersgd import BatchedPowerSGD

    class Reversed(BatchedPowerSGD):
        def reduce(self, bucket):
            assert bucket.names == tuple(reversed(NAMES))  # as the simulator has them arrive
            yield from super().reduce(bucket)

    result = commhub.simulate(Reversed(start_step=0), gradients, ranks=2)
    expected = Reference(2, 1).step(0, [gradients(r, 0) for r in range(2)])
    for got, want in zip(result.gradients[0], expected, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("start_step", [0, 1, 3])
def test_until_the_start_step_the_average_is_plain_and_exact(start_step):
    for steps in range(1, 6):
        plain = commhub.simulate("allreduce", gradients, ranks=2, steps=steps)
        result = commhub.simulate("batched_powersgd", gradients, ranks=2, steps=steps, start_step=start_step)
        exact = all(torch.equal(a, b) for a, b in zip(plain.gradients[0], result.gradients[0], strict=True))
        assert exact == (steps <= start_step)


def test_the_default_start_step_is_a_thousand():
    assert commhub.simulate("batched_powersgd", gradients, ranks=2, steps=2).compression == 1


def test_with_warm_start_a_constant_gradient_is_approximated_ever_better():
    """As well as by the best approximation of that rank."""
    grads = [[torch.randn(64, 64, generator=torch.Generator().manual_seed(1))]] * 2
    best = torch.linalg.svdvals(grads[0][0])[2:].norm()
    options = {"start_step": 0, "error_feedback": False}
    errors = []
    for steps in (1, 5, 200):
        result = commhub.simulate("batched_powersgd_rank2", grads, steps=steps, **options)
        errors.append(float((result.gradients[0][0] - grads[0][0]).norm()))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] == pytest.approx(float(best), rel=1e-2)
