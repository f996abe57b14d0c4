"""One factor a step, the other from the step before (ACP-SGD): half the bytes, one message per bucket."""

import math

import pytest
import torch
from commhub_powersgd import PowerSGD
from commhub_powersgd._layout import Matrix
from commhub_powersgd._random import Source
from torch.nn.parallel import DistributedDataParallel

import commhub
from commhub.testing import assert_equal_across_ranks, bitwise_equal, mlp, train

SHAPES = [(40, 30), (7,), (12, 8, 3, 3), (25, 60), ()]
KB = 1 / 1024


def seeded(*key):
    return torch.Generator().manual_seed(hash(key) % 2**31)


def gradients(rank, step):
    return [torch.randn(shape, generator=seeded(rank, step, i)) for i, shape in enumerate(SHAPES)]


def run(given, **options):
    options = {"start_step": 0, "alternating": True, "min_compression_rate": 0.5, **options}
    return commhub.simulate("powersgd", given, **options)


class Reference:
    """ACP-SGD plainly in float64, the stale factor orthonormal, error feedback on each rank's own factor."""

    def __init__(self, ranks, rank, error_feedback):
        self.ranks, self.rank, self.error_feedback = ranks, rank, error_feedback
        self.q, self.p, self.residuals = {}, {}, {}

    def step(self, step, gradients):
        return [self.average(step, i, [mine[i].double() for mine in gradients]) for i in range(len(SHAPES))]

    def average(self, step, i, tensors):
        if len(SHAPES[i]) < 2:
            return sum(tensors) / self.ranks
        n, m = SHAPES[i][0], math.prod(SHAPES[i][1:])
        start = Source(0, torch.device("cpu")).factor(Matrix(str(i), n, m, self.rank), torch.float32).T.double()
        residuals = self.residuals.get(i, [torch.zeros(n, m, dtype=torch.float64)] * self.ranks)
        given = [g.reshape(n, m) + e for g, e in zip(tensors, residuals, strict=True)]
        if step % 2 == 0:
            stale = torch.linalg.qr(self.q.get(i, start)).Q
            own = [g @ stale for g in given]
            self.p[i] = sum(own) / self.ranks
            contributed, result = [p @ stale.T for p in own], self.p[i] @ stale.T
        else:
            stale = torch.linalg.qr(self.p[i]).Q
            own = [g.T @ stale for g in given]
            self.q[i] = sum(own) / self.ranks
            contributed, result = [stale @ q.T for q in own], stale @ self.q[i].T
        if self.error_feedback:
            self.residuals[i] = [g - c for g, c in zip(given, contributed, strict=True)]
        return result.reshape(SHAPES[i])


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("rank", [1, 2, 4])
@pytest.mark.parametrize("error_feedback", [True, False])
@pytest.mark.parametrize("batched", [True, False])
def test_the_hook_computes_what_the_paper_says(ranks, rank, error_feedback, batched):
    reference = Reference(ranks, rank, error_feedback)
    options = {"ranks": ranks, "rank": rank, "error_feedback": error_feedback, "batch_same_shapes": batched}
    for steps in range(1, 6):
        expected = reference.step(steps - 1, [gradients(r, steps - 1) for r in range(ranks)])
        result = run(gradients, steps=steps, **options)
        for mine in result.gradients:
            for got, want in zip(mine, expected, strict=True):
                torch.testing.assert_close(got.double(), want, rtol=1e-3, atol=1e-4)
    for r, state in enumerate(result.states):
        for i, residuals in reference.residuals.items():
            got = state.local(str(i))["residual"].double().reshape(residuals[r].shape)
            torch.testing.assert_close(got, residuals[r], rtol=1e-3, atol=1e-4)


def test_which_factor_comes_first_is_counted_from_the_start_step():
    """Until then the average is plain."""
    grads = [[torch.randn(40, 30, generator=seeded(r))] for r in range(2)]
    first = run(grads, steps=1).gradients[0][0]
    for start_step in (1, 2, 3):
        later = run(grads, steps=start_step + 1, start_step=start_step).gradients[0][0]
        assert (later - first).norm() < 1e-4 * first.norm()


def test_a_fixed_mean_gradient_is_approximated_ever_better():
    """As well as by the best approximation of that rank; ranks differ."""
    mean, noise = (torch.randn(40, 30, generator=seeded(i)) for i in range(2))
    grads = [[mean + noise], [mean - noise]]
    best = torch.linalg.svdvals(mean)[2:].norm()
    errors = []
    for steps in (1, 5, 200):
        got = run(grads, steps=steps, rank=2, error_feedback=False).gradients[0][0]
        errors.append(float((got - mean).norm()))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] == pytest.approx(float(best), rel=1e-2)


@pytest.mark.parametrize(("rank", "true_rank"), [(r, k) for r in (1, 2, 4) for k in range(1, r + 1)])
def test_a_fixed_mean_of_rank_at_most_r_is_reproduced_from_the_second_step(rank, true_rank):
    left, right = torch.randn(40, true_rank, generator=seeded(1)), torch.randn(true_rank, 30, generator=seeded(2))
    mean, noise = left @ right, torch.randn(40, 30, generator=seeded(3))
    for steps in (3, 4, 7, 8):
        got = run([[mean + noise], [mean - noise]], steps=steps, rank=rank, error_feedback=False).gradients[0][0]
        assert (got - mean).norm() < 1e-4 * mean.norm()


@pytest.mark.parametrize("rank", [1, 2])
def test_with_error_feedback_all_that_was_given_arrives(rank):
    """Summed over steps: outputs + mean residual = mean gradients; what waits does not grow."""
    grads = [[torch.randn(16, 24, generator=seeded(r))] for r in range(2)]
    hook = Recording(rank=rank, start_step=0, alternating=True, min_compression_rate=0.5)
    result = commhub.simulate(hook, grads, steps=300)
    waiting = sum(state.local("0")["residual"] for state in result.states) / 2
    mean = (grads[0][0] + grads[1][0]) / 2
    total = sum(output.double() for output in result.hooks[0].outputs).view(16, 24)
    torch.testing.assert_close(total + waiting, 300 * mean.double(), rtol=1e-4, atol=1e-2)
    assert waiting.norm() < 2 * 24 / rank * mean.norm()


class Recording(PowerSGD):
    """Keeps what came out of each step."""

    def prepare(self, setup):
        self.outputs = []
        super().prepare(setup)

    def reduce(self, bucket):
        yield from super().reduce(bucket)
        self.outputs.append(bucket.flat.clone())


@pytest.mark.parametrize("p", [2, 4])
def test_half_the_bytes_in_one_message(p):
    ones = [torch.ones(shape) for shape in [(40, 30), (9,), (50, 20)]]
    for steps, factors in ((1, 90), (2, 90 + 50), (5, 3 * 90 + 2 * 50)):
        result = run([ones] * p, steps=steps, rank=2, buckets=2)
        assert result.sent_bytes == pytest.approx((2 * (p - 1) / p * 4 * (2 * factors + 9 * steps),) * p)
        assert result.hooks[0].compression_stats()[1:] == (steps * (1200 + 1000 + 9), 2 * factors + 9 * steps)


def test_a_step_is_one_collective():
    asked = []

    class Counting(PowerSGD):
        def reduce(self, bucket):
            exchange, value = super().reduce(bucket), None
            while True:
                try:
                    request = exchange.send(value)
                except StopIteration:
                    return
                asked.append(request.tensor.numel())
                value = yield request

    commhub.simulate(Counting(start_step=0, alternating=True), [[torch.ones(40, 30), torch.ones(5)]], steps=3)
    assert asked == [45, 35, 45]


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_zero_stays_zero(rank):
    grads = [[torch.zeros(32, 24), torch.randn(32, 24, generator=seeded(r))] for r in range(2)]
    for steps in (1, 2, 3, 30):
        result = run(grads, steps=steps, rank=rank)
        assert result.gradients[0][0].count_nonzero() == 0
        assert result.states[1].local("0")["residual"].count_nonzero() == 0


def test_after_a_while_at_zero_a_gradient_is_followed():
    mean = torch.randn(64, 2, generator=seeded(1)) @ torch.randn(2, 48, generator=seeded(2))

    def given(rank, step):
        return [mean if step >= 5 else torch.zeros(64, 48)]

    for steps in (7, 8):
        got = run(given, ranks=2, steps=steps, rank=2, error_feedback=False).gradients[0][0]
        assert (got - mean).norm() < 1e-4 * mean.norm()


@pytest.mark.parametrize("rank", [1, 2])
def test_residuals_stay_bounded_when_ranks_pull_in_opposite_directions(rank):
    """The mean is zero and its factors say nothing: a stale factor must not look one way for ever."""
    gradient = torch.randn(16, 24, generator=seeded(4))
    for steps in (100, 400):
        result = run([[gradient], [-gradient]], rank=rank, steps=steps)
        for state in result.states:
            assert state.local("0")["residual"].norm() < 2 * 24 * gradient.norm()


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_tiny_and_huge_gradients_are_no_different(scale):
    mean = torch.randn(40, 2, generator=seeded(1)) @ torch.randn(2, 30, generator=seeded(2)) * scale
    for steps in (3, 4):
        got = run([[mean]] * 2, rank=2, steps=steps, error_feedback=False).gradients[0][0]
        assert (got - mean).double().norm() < 1e-4 * mean.double().norm()


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("at", [1, 2])
@pytest.mark.parametrize("error_feedback", [True, False])
def test_a_non_finite_step_leaves_no_trace(bad, at, error_feedback):
    def spoiled(rank, step):
        made = gradients(rank, step)
        if (rank, step) == (1, at):
            made[0][3, 4] = bad
        return made

    options = {"ranks": 2, "rank": 2, "error_feedback": error_feedback}
    before, during, after = (run(spoiled, steps=at + n, **options) for n in (0, 1, 2))
    for mine in during.gradients:
        assert not mine[0].isfinite().any()
    for mine in after.gradients:
        assert all(g.isfinite().all() and g.abs().max() < 100 for g in mine)
    for kept, left in zip(before.states, during.states, strict=True):
        for scope in ("local", "shared"):
            ours, theirs = kept.export(scope), left.export(scope)
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(ours[n][k], theirs[n][k]) for n in ours for k in ours[n])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_work_in_float32_or_wider(dtype):
    left, right = torch.randn(40, 1, generator=seeded(1)), torch.randn(1, 30, generator=seeded(2))
    mean = (left.double() @ right.double()).to(dtype)
    result = run([[mean]] * 2, steps=4, error_feedback=False)
    assert result.gradients[0][0].dtype == dtype
    tolerance = {torch.bfloat16: 0.02, torch.float16: 2e-3}.get(dtype, 1e-9)
    torch.testing.assert_close(result.gradients[0][0], mean, rtol=tolerance, atol=tolerance)
    wide = torch.promote_types(dtype, torch.float32)
    assert {result.states[0].shared("0")[key].dtype for key in "pq"} == {wide}


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"num_power_iterations": 2}, "alternating and num_power_iterations=2 exclude each other"),
        ({"warm_start": False}, "alternating needs warm_start"),
    ],
)
def test_what_does_not_go_together_is_refused_when_the_hook_is_made(options, match):
    with pytest.raises(ValueError, match=match):
        PowerSGD(alternating=True, **options)
    with pytest.raises(commhub.HookOptionError, match=match):
        run([[torch.ones(3, 4)]], **options)


# On real ranks.


def deep(layers=12, width=24):
    return mlp([width] * (layers + 1))


def many_buckets(steps):
    model = DistributedDataParallel(deep(), bucket_cap_mb=2 * KB)
    registration = commhub.register(model, "powersgd(rank=2, alternating=true, start_step=3, min_compression_rate=1)")
    outcome = train(model, steps)
    for found in (*outcome.gradients[:6], outcome.gradients[-1]):
        assert_equal_across_ranks(found)
    assert_equal_across_ranks(outcome.parameters)
    shared = registration.state_dict()["shared"]
    assert_equal_across_ranks({f"{name} {key}": t for name, table in shared.items() for key, t in table.items()})
    return len(shared), outcome.losses


def test_many_steps_of_twelve_buckets_end_and_all_ranks_agree(ranks):
    for matrices, losses in ranks(many_buckets, 2, 40):
        assert matrices == 12
        assert losses[-1] < losses[0]


def half(path, cap, first):
    model = DistributedDataParallel(deep(), bucket_cap_mb=cap)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    registration = commhub.register(model, "powersgd(alternating=true, start_step=2, min_compression_rate=1)")
    file = f"{path}/{torch.distributed.get_rank()}.pt"
    if first:
        train(model, 7, optimizer=optimizer)
        parts = {"model": model.module, "optimizer": optimizer, "hook": registration}
        torch.save({name: part.state_dict() for name, part in parts.items()}, file)
    else:
        saved = torch.load(file, weights_only=True)
        for name, part in {"model": model.module, "optimizer": optimizer, "hook": registration}.items():
            part.load_state_dict(saved[name])
    outcome = train(model, 6, first_step=7, optimizer=optimizer)
    state = registration.state_dict()
    tensors = dict(outcome.parameters)
    for scope, tables in (("shared", state["shared"]), *state["local"].items()):
        tensors |= {f"{scope} {name} {key}": t for name, table in tables.items() for key, t in table.items()}
    return tensors


def test_training_resumes_in_new_processes_bit_for_bit_with_other_buckets(ranks, tmp_path):
    """In the middle of a pair: the factor that was stale before the save is the one after it."""
    straight = ranks(half, 2, str(tmp_path), 2 * KB, True)
    for result, mine in zip(ranks.fresh(half, 2, str(tmp_path), 5 * KB, False), straight, strict=True):
        assert result.value.keys() == mine.keys()
        assert len(mine) == 24 + 2 * 12 + 12
        for name, tensor in mine.items():
            assert bitwise_equal(result.value[name], tensor), name
