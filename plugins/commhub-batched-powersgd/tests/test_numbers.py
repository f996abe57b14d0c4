"""What must hold of the numbers: zero stays zero, finite again after Inf, every kind of parameter, bytes."""

import copy
import math

import pytest
import torch

import commhub


def seeded(*key):
    return torch.Generator().manual_seed(hash(key) % 2**31)


def run(gradients, **options):
    return commhub.simulate("batched_powersgd", gradients, **{"start_step": 0, **options})


# Zero stays zero, though it shares a matrix with what is not.


@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("warm_start", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gradient_that_was_always_zero_stays_exactly_zero(rank, warm_start, dtype):
    grads = [
        [torch.randn(20, 24, generator=seeded(r)).to(dtype), torch.zeros(32, 24, dtype=dtype), torch.ones(9).to(dtype)]
        for r in range(2)
    ]
    for steps in (1, 2, 50):
        result = run(grads, rank=rank, steps=steps, warm_start=warm_start)
        assert result.gradients[0][1].count_nonzero() == 0
        assert result.gradients[0][0].count_nonzero() > 0
        assert all(state.local("1")["residual"].count_nonzero() == 0 for state in result.states)


def test_a_gradient_that_is_zero_on_one_rank_only_is_averaged():
    """What the rank with the zero contributed all the same is in its residual."""
    grads = [[torch.randn(30, 30, generator=seeded(1)), torch.randn(40, generator=seeded(2))] for _ in range(2)]
    grads[0][1] = torch.zeros(40)
    result = run(grads)
    assert result.gradients[0][1].count_nonzero() > 0
    residuals = [state.local("1")["residual"] for state in result.states]
    assert residuals[0].count_nonzero() > 0
    total = result.gradients[0][1] + sum(residuals) / 2
    torch.testing.assert_close(total, grads[1][1] / 2, rtol=1e-4, atol=1e-5)


def test_what_still_waits_is_sent_when_gradients_have_become_zero():
    def given(rank, step):
        return [torch.randn(30, 30, generator=seeded(rank)) if step == 0 else torch.zeros(30, 30)]

    waiting = run(given, ranks=2, steps=1).states[0].local("0")["residual"].norm()
    result = run(given, ranks=2, steps=2)
    assert result.gradients[0][0].count_nonzero() > 0
    assert result.states[0].local("0")["residual"].norm() < waiting


# One non-finite step.


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan, 3e38])
@pytest.mark.parametrize("where", [0, 1])
@pytest.mark.parametrize("buckets", [1, 2])
@pytest.mark.parametrize("options", [{}, {"error_feedback": False, "warm_start": False}], ids=["state", "stateless"])
def test_a_non_finite_step_reaches_all_ranks_and_leaves_no_trace(bad, where, buckets, options):
    def grads(rank, step):
        made = [torch.randn(s, generator=seeded(rank, step)) for s in [(40, 30), (9,), (24, 32)]]
        if step == 2 and rank == where:
            made[0].view(-1)[5:9] = bad
        return made

    options = {**options, "rank": 2, "buckets": buckets, "ranks": 2}
    broken, untouched = run(grads, steps=3, **options), run(grads, steps=2, **options)
    for mine in broken.gradients:
        assert not mine[0].isfinite().all()
    for broke, kept in zip(broken.states, untouched.states, strict=True):
        ours, theirs = broke.export("shared"), kept.export("shared")
        assert all(torch.equal(theirs[n][k], t) for n, table in ours.items() for k, t in table.items())
        ours, theirs = broke.export("local"), kept.export("local")
        same_bucket = {"0", "1", "2"} if buckets == 1 else {"0"}
        assert all(torch.equal(theirs[n]["residual"], t["residual"]) for n, t in ours.items() if n in same_bucket)
    for mine in run(grads, steps=4, **options).gradients:
        assert all(g.isfinite().all() and g.abs().max() < 100 for g in mine)


# Residuals.


@pytest.mark.parametrize("rank", [1, 2])
def test_residuals_stay_bounded_when_ranks_pull_in_opposite_directions(rank):
    gradient = torch.randn(20, 20, generator=seeded(4))
    for steps in (100, 400):
        result = run([[gradient], [-gradient]], rank=rank, steps=steps)
        for state in result.states:
            assert state.local("0")["residual"].norm() < 2 * 20 * gradient.norm()


def test_a_residual_is_what_this_rank_itself_left_unsent():
    """Not what the mean left unsent: rank 0 gave nothing, so nothing waits there."""
    result = run([[torch.zeros(32, 32)], [torch.randn(32, 32, generator=seeded(1))]])
    own = [state.local("0")["residual"] for state in result.states]
    assert own[0].count_nonzero() == 0
    assert own[1].norm() > 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_what_waits_for_a_parameter_that_now_has_too_small_a_bucket_is_sent(dtype):
    """In one bucket it was compressed; in a bucket of its own it is too small, and all is sent exactly."""
    from commhub_batched_powersgd import BatchedPowerSGD

    class Rebuilt(BatchedPowerSGD):
        def reduce(self, bucket):
            if bucket.step == 0:
                yield from super().reduce(bucket)
            else:
                for parameter in bucket.parameters:
                    yield from super().reduce(bucket.part([parameter]))

    grads = [[torch.randn(s, generator=seeded(r, s[0])).to(dtype) for s in [(30, 30), (7,)]] for r in range(2)]
    first = run(grads, steps=1)
    waiting = sum(state.local("1")["residual"] for state in first.states) / 2
    assert waiting.norm() > 0
    second = commhub.simulate(Rebuilt(start_step=0), grads, steps=2)
    expected = waiting + (grads[0][1].float() + grads[1][1].float()) / 2
    tolerance = {torch.float16: 2e-3, torch.bfloat16: 2e-2}.get(dtype, 1e-5)
    torch.testing.assert_close(second.gradients[0][1].float(), expected, rtol=tolerance, atol=tolerance)
    left = [state.local("1")["residual"] for state in second.states]
    assert all(r.abs().max() <= tolerance * 4 for r in left)
    if dtype == torch.float32:
        assert not any(r.any() for r in left)


# Every kind of parameter.

KINDS = {
    "scalar": torch.randn((), generator=seeded(1)),
    "empty": torch.zeros(0, 3),
    "vector": torch.randn(5, generator=seeded(2)),
    "matrix": torch.ones(40, 30),
    "bf16": torch.ones(40, 30).bfloat16(),
    "fp16": torch.ones(40, 30).half(),
    "fp64": torch.ones(40, 30).double(),
    "complex64": torch.randn(20, 20, dtype=torch.complex64, generator=seeded(7)),
    "channels_last": torch.ones(16, 8, 3, 3).contiguous(memory_format=torch.channels_last),
    "transposed": torch.ones(40, 30).t(),
}


@pytest.mark.parametrize("buckets", [1, 3, 20])
@pytest.mark.parametrize("steps", [1, 3])
def test_every_kind_of_parameter_is_averaged_alike_on_all_ranks(buckets, steps):
    grads = list(KINDS.values())
    result = run([grads, grads], steps=steps, buckets=buckets, rank=2)
    for (name, want), got, other in zip(KINDS.items(), *result.gradients, strict=True):
        assert (got.dtype, got.shape, got.stride()) == (want.dtype, want.shape, want.stride()), name
        assert got is other, name
        assert got.isfinite().all(), name
        if want.is_complex():
            torch.testing.assert_close(got, want)
    states = result.states[0]
    kept = {name for i, name in enumerate(KINDS) if "residual" in states.local(str(i))}
    assert kept == KINDS.keys() - {"empty", "complex64"}
    for i, (name, gradient) in enumerate(KINDS.items()):
        if name in kept:
            wide = torch.promote_types(gradient.dtype, torch.float32)
            assert states.local(str(i))["residual"].dtype == states.shared(str(i))["q"].dtype == wide


def test_channels_last_elements_stay_with_their_places():
    """A bucket of rank 1 in memory order comes back as it is, whatever the strides."""
    memory = torch.outer(torch.randn(24, generator=seeded(1)), torch.randn(24, generator=seeded(2)))
    gradient = memory.view(4, 4, 6, 6).permute(0, 3, 1, 2)
    assert gradient.is_contiguous(memory_format=torch.channels_last)
    result = run([[gradient]] * 2)
    torch.testing.assert_close(result.gradients[0][0], gradient, rtol=1e-4, atol=1e-5)


# How much is sent.


@pytest.mark.parametrize("p", [2, 3, 4])
@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("iterations", [1, 2])
def test_sent_bytes_follow_the_formula(p, rank, iterations):
    shapes = [(40, 30), (7,), (12, 8, 3, 3), (3, 4), ()]
    ones = [torch.ones(shape) for shape in shapes]
    result = run([ones] * p, steps=3, rank=rank, start_step=1, num_power_iterations=iterations)
    whole = 1200 + 7 + 864 + 12 + 1
    each = iterations * 2 * 46 * rank + 5  # 45 * 45 < 2084 <= 46 * 46
    assert result.sent_bytes == pytest.approx((2 * (p - 1) / p * 4 * (whole + 2 * each),) * p)
    assert result.hooks[0].compression_stats() == (whole / each, 2 * whole, 2 * each)


@pytest.mark.parametrize(("n", "rate", "compressed"), [(64, 2, True), (64, 4, False), (64, 3.9, True), (2, 2, False)])
def test_a_bucket_is_compressed_where_its_factors_are_so_many_times_smaller(n, rate, compressed):
    """2 * 8 * 4 is not below 64."""
    result = run([[torch.ones(n)]] * 2, min_compression_rate=rate)
    assert result.sent_bytes[0] == 4 * (2 * math.isqrt(n) + 1 if compressed else n)


def test_stats_are_logged_by_rank_0(caplog):
    caplog.set_level("INFO", "commhub")
    run([[torch.ones(40, 40)]] * 2, steps=5, start_step=1, stats_frequency=2)
    assert [r.getMessage() for r in caplog.records if "powersgd" in r.getMessage()] == [
        "batched_powersgd: 1600 elements sent as 81 by step 2, a rate of 19.8",
        "batched_powersgd: 4800 elements sent as 243 by step 4, a rate of 19.8",
    ]


@pytest.mark.parametrize("wire", ["fp16", "bf16"])
def test_factors_may_travel_in_sixteen_bits(wire):
    mean = torch.outer(torch.randn(40, generator=seeded(1)), torch.randn(40, generator=seeded(2)))
    result = run([[mean, torch.zeros(5)]] * 4, steps=2, wire=wire, error_feedback=False)
    assert result.gradients[0][1].count_nonzero() == 0
    assert result.sent_bytes == (2 * 2 * 2 * 3 / 4 * (2 * 41 + 2),) * 4


def test_the_global_generator_is_left_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    for warm_start in (True, False):
        run([[torch.ones(40, 30)]] * 2, steps=3, rank=2, warm_start=warm_start)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("compiled", ["0", "1"])
def test_a_hook_that_was_at_work_can_be_copied_and_begins_anew(compiled, monkeypatch):
    monkeypatch.setenv("COMMHUB_COMPILE", compiled)
    gradients = [[torch.ones(40, 30)]] * 2
    hook = commhub.simulate("batched_powersgd(start_step=0, rank=2)", gradients, steps=2).hooks[0]
    other = copy.deepcopy(hook)
    assert (other.rank, other.start_step, other._squares) == (2, 0, None)
    result = commhub.simulate(hook, gradients, steps=2)
    torch.testing.assert_close(result.gradients[0][0], torch.ones(40, 30))
