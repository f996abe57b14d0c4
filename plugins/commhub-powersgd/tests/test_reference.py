"""The hook against algorithms 1 and 2 of the paper, written plainly in float64."""

import math

import pytest
import torch
from commhub_powersgd._layout import Matrix
from commhub_powersgd._random import Source

import commhub

pytestmark = pytest.mark.usefixtures("every_way")

SHAPES = [(40, 30), (7,), (12, 8, 3, 3), (3, 4), (25, 60), ()]


def gradients(rank, step, shapes=SHAPES):
    generator = torch.Generator().manual_seed(1000 * rank + step)
    return [torch.randn(shape, generator=generator) for shape in shapes]


class Reference:
    """Lists of matrices, one per rank; nothing shared, nothing in place, nothing packed."""

    def __init__(self, ranks, rank, error_feedback, warm_start, starts):
        self.p, self.rank, self.error_feedback, self.warm_start = ranks, rank, error_feedback, warm_start
        self.starts = starts  # (parameter, step) -> Q
        self.q = {}
        self.e = {}

    def step(self, step, gradients):
        return [self.average(step, i, [mine[i].double() for mine in gradients]) for i in range(len(gradients[0]))]

    def average(self, step, i, tensors):
        shape = tensors[0].shape
        if len(shape) < 2:
            return sum(tensors) / self.p
        n, m = shape[0], math.prod(shape[1:])
        r = min(n, m, self.rank)
        if not (n + m) * r * 2 < n * m:
            return sum(tensors) / self.p
        residuals = self.e.get(i, [torch.zeros(n, m, dtype=torch.float64)] * self.p)
        delta = [g.reshape(n, m) + e for g, e in zip(tensors, residuals, strict=True)]
        q = self.q[i] if self.warm_start and i in self.q else self.starts(i, step)
        p = sum(d @ q for d in delta) / self.p
        p_hat = torch.linalg.qr(p).Q
        own = [d.T @ p_hat for d in delta]
        q = sum(own) / self.p
        if self.error_feedback:
            self.e[i] = [d - p_hat @ o.T for d, o in zip(delta, own, strict=True)]
        self.q[i] = q
        return (p_hat @ q.T).reshape(shape)


def starts_of(rank, warm_start, shapes=SHAPES):
    source = Source(0, torch.device("cpu"))

    def start(i, step):
        n, m = shapes[i][0], math.prod(shapes[i][1:])
        matrix = Matrix(str(i), n, m, min(n, m, rank))
        return source.factor(matrix, torch.float32, None if warm_start else step).T.double()

    return start


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("rank", [1, 2, 4])
@pytest.mark.parametrize("error_feedback", [True, False])
@pytest.mark.parametrize("warm_start", [True, False])
def test_the_hook_computes_what_the_paper_says(ranks, rank, error_feedback, warm_start):
    reference = Reference(ranks, rank, error_feedback, warm_start, starts_of(rank, warm_start))
    for step in range(5):
        expected = reference.step(step, [gradients(r, step) for r in range(ranks)])
    result = commhub.simulate(
        "powersgd",
        gradients,
        ranks=ranks,
        steps=5,
        rank=rank,
        start_step=0,
        error_feedback=error_feedback,
        warm_start=warm_start,
    )
    for mine in result.gradients:
        for got, want in zip(mine, expected, strict=True):
            torch.testing.assert_close(got.double(), want, rtol=1e-3, atol=1e-4)
    for r, state in enumerate(result.states):
        for i in reference.e:
            got = state.local(str(i))["residual"].double().reshape(reference.e[i][r].shape)
            torch.testing.assert_close(got, reference.e[i][r], rtol=1e-3, atol=1e-4)


def test_in_float64_they_agree_to_float64():
    def doubles(rank, step):
        return [g.double() for g in gradients(rank, step)]

    sources = Source(0, torch.device("cpu"))
    starts = [
        sources.factor(Matrix(str(i), s[0], math.prod(s[1:]), 2), torch.float64).T if len(s) > 1 else None
        for i, s in enumerate(SHAPES)
    ]
    reference = Reference(2, 2, True, True, lambda i, step: starts[i])
    for step in range(5):
        expected = reference.step(step, [doubles(r, step) for r in range(2)])
    result = commhub.simulate("powersgd_rank2", doubles, ranks=2, steps=5, start_step=0)
    for got, want in zip(result.gradients[0], expected, strict=True):
        assert got.dtype == torch.float64
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("rank", [1, 2])
def test_all_that_was_sent_and_all_that_waits_is_all_that_was_given(rank):
    """Summed over steps: outputs + mean residual = mean gradients."""
    sent = [torch.zeros(s, dtype=torch.float64) for s in SHAPES]
    given = [torch.zeros(s, dtype=torch.float64) for s in SHAPES]
    for steps in range(1, 9):  # the simulator returns the last step only
        result = commhub.simulate("powersgd", gradients, ranks=2, steps=steps, rank=rank, start_step=0)
        for total, output in zip(sent, result.gradients[0], strict=True):
            total += output
        for r in range(2):
            for total, gradient in zip(given, gradients(r, steps - 1), strict=True):
                total += gradient.double() / 2
    for i, (total, all_given) in enumerate(zip(sent, given, strict=True)):
        waiting = [state.local(str(i)).get("residual", torch.zeros(())) for state in result.states]
        torch.testing.assert_close(total + sum(waiting).double() / 2, all_given, rtol=1e-4, atol=1e-4)


def test_a_residual_is_what_this_rank_itself_left_unsent():
    """Not what the mean left unsent: rank 0 gave nothing, so nothing waits there."""
    result = commhub.simulate("powersgd", [[torch.zeros(32, 32)], [torch.randn(32, 32)]], start_step=0)
    own = [state.local("0")["residual"] for state in result.states]
    assert own[0].count_nonzero() == 0
    assert own[1].norm() > 1


def test_what_is_sent_exactly_has_no_residual():
    result = commhub.simulate("powersgd", gradients, ranks=2, start_step=0)
    assert [i for i in range(len(SHAPES)) if "residual" in result.states[0].local(str(i))] == [0, 2, 4]
    mean = [sum(g) / 2 for g in zip(gradients(0, 0), gradients(1, 0), strict=True)]
    for i in (1, 3, 5):
        torch.testing.assert_close(result.gradients[0][i], mean[i])


@pytest.mark.parametrize("start_step", [0, 1, 3])
def test_until_the_start_step_the_average_is_plain_and_exact(start_step):
    for steps in range(1, 6):
        plain = commhub.simulate("allreduce", gradients, ranks=2, steps=steps)
        result = commhub.simulate("powersgd", gradients, ranks=2, steps=steps, start_step=start_step)
        exact = all(torch.equal(a, b) for a, b in zip(plain.gradients[0], result.gradients[0], strict=True))
        assert exact == (steps <= start_step)


def test_the_default_start_step_is_a_thousand():
    assert commhub.info("powersgd").spec.option("start_step").default == 1000
    result = commhub.simulate("powersgd", gradients, ranks=2, steps=2)
    assert result.compression == 1


def test_without_compressible_parameters_it_is_allreduce():
    def small(rank, step):
        return gradients(rank, step, [(5,), (2, 2), (), (0, 3)])

    plain = commhub.simulate("allreduce", small, ranks=3)
    result = commhub.simulate("powersgd", small, ranks=3, start_step=0)
    assert all(torch.equal(a, b) for a, b in zip(plain.gradients[0], result.gradients[0], strict=True))
    assert result.sent_bytes == plain.sent_bytes
