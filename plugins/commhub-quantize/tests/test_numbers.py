"""What the numbers promise, in the simulator."""

import os
from itertools import cycle, product

import pytest
import torch

import commhub

HOOKS = ["quantize_per_channel", "quantize_per_tensor"]
NEAREST = [{}, {"symmetric": False}, {"bits": 4}, {"bits": 4, "symmetric": False}, {"bits": 2}]

FEEDING_BACK = [*NEAREST, {"bits": 2, "symmetric": False}, {"bits": 4, "stochastic_rounding": True}]
BOUNDED = list(zip(cycle(HOOKS), FEEDING_BACK[2:], strict=False))
if os.environ.get("COMMHUB_EVERY_CHECK"):
    BOUNDED = list(product(HOOKS, FEEDING_BACK))


def drawn(shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def error(hook, gradients, **options):
    """Of each tensor's mean, relative to the ranks' largest norm."""
    got = commhub.simulate(hook, gradients, **options).gradients[0]
    mean = [sum(g.double() for g in same) / len(gradients) for same in zip(*gradients, strict=True)]
    sizes = [max(g.double().norm() for g in same) for same in zip(*gradients, strict=True)]
    return [float((a.double() - b).norm() / s) for a, b, s in zip(got, mean, sizes, strict=True)]


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("p", [1, 2, 4, 9])
def test_the_error_of_8_bits_keeps_the_promise(hook, p):
    tolerance = commhub.info(hook).spec.tolerance
    gradients = [[drawn((40, 70), rank), drawn((3, 3, 16, 16), 50 + rank)] for rank in range(p)]
    assert max(error(hook, gradients)) < tolerance
    assert max(error(hook, gradients, symmetric=False)) < tolerance


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("size", [1e-30, 1e-12, 1e-8, 1e8, 1e30])
def test_there_is_no_floor_on_scales(hook, size):
    assert max(error(hook, [[drawn((40, 70), rank) * size] for rank in range(2)])) < 0.02


@pytest.mark.parametrize("hook", HOOKS)
def test_parameters_of_other_magnitudes_in_one_bucket_do_not_hurt_each_other(hook):
    gradients = [[drawn((40, 70), rank), drawn((40, 70), 9 + rank) * 1e-6, drawn((64, 64), rank)] for rank in range(2)]
    assert max(error(hook, gradients)) < 0.02


@pytest.mark.parametrize("hook", HOOKS)
def test_float64_stays_float64_in_scales_and_sums(hook):
    gradients = [[drawn((40, 64), rank, torch.float64) * 1e-60] for rank in range(2)]
    assert max(error(hook, gradients)) < 0.02
    got = commhub.simulate(hook, gradients).gradients[0][0]
    assert got.dtype == torch.float64
    assert not torch.equal(got, got.float().double())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("options", NEAREST)
def test_16_bit_gradients_are_worked_on_in_float32(dtype, options):
    gradients = [[drawn((40, 64), rank).to(dtype), drawn((9,), rank).to(dtype)] for rank in range(2)]
    result = commhub.simulate("quantize_per_channel", gradients, steps=2, **options)
    assert [g.dtype for g in result.gradients[0]] == [dtype, dtype]
    if options.get("bits", 8) < 8:
        assert result.states[0].local("0")["residual"].dtype == torch.float32
    torch.testing.assert_close(
        result.gradients[0][1], (sum(g[1].float() for g in gradients) / 2).to(dtype), rtol=0.01, atol=1e-3
    )


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("options", NEAREST)
def test_zero_stays_zero_beside_what_is_not(hook, options):
    """Whole parameters, and single elements of a row."""
    some = drawn((40, 64))
    some[::2] = 0
    gradients = [[torch.zeros(40, 64), some * (1 + rank), torch.zeros(5)] for rank in range(2)]
    for steps in (1, 4):
        zero, partly, small = commhub.simulate(hook, gradients, steps=steps, **options).gradients[1]
        assert not zero.any()
        assert not small.any()
        assert not partly[::2].any()
        assert partly.any()


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("options", NEAREST)
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_what_is_no_number_reaches_all_ranks_and_no_residual(hook, options, value):
    def gradients(rank, step):
        given = [drawn((40, 64), 10 * step + rank), drawn((33, 41), 10 * step + rank), drawn((5,), rank)]
        if step == 2 and rank == 1:
            given[0][3, 4] = value
            given[1][32, 40] = value
            given[2][1] = value
        return given

    spoilt = commhub.simulate(hook, gradients, ranks=2, steps=3, error_feedback=True, **options)
    before = commhub.simulate(hook, gradients, ranks=2, steps=2, error_feedback=True, **options)
    for got in spoilt.gradients:
        assert not got[0][3, 4].isfinite()
        assert not got[2][1].isfinite()
        assert torch.equal(got[0], spoilt.gradients[0][0]) or got[0].isnan().any()
    for rank in range(2):
        for name in ("0", "1"):
            kept, was = (run.states[rank].local(name)["residual"] for run in (spoilt, before))
            assert torch.equal(kept, was)
    after = commhub.simulate(hook, gradients, ranks=2, steps=4, error_feedback=True, **options)
    assert all(g.isfinite().all() for got in after.gradients for g in got)


@pytest.mark.parametrize(("hook", "options"), BOUNDED)
def test_residuals_stay_bounded(hook, options):
    """Gradients that cancel for ever, with tails: what stays unsent after 120 steps is no more than after 40."""
    base = drawn((16, 64)) ** 3

    def gradients(rank, step):
        return [base * (-1) ** rank]

    def left(steps):
        run = commhub.simulate(hook, gradients, ranks=4, steps=steps, error_feedback=True, **options)
        return max(float(state.local("0")["residual"].norm()) for state in run.states)

    assert left(120) < 1.5 * left(40) + float(base.norm())


def test_what_is_small_goes_dense_and_exact_unless_asked_otherwise():
    gradients = [[drawn((40, 64), rank), drawn((20, 20), rank), drawn((3000,), rank)] for rank in range(2)]
    errors = error("quantize_per_channel", gradients)
    assert errors[0] > 1e-3
    assert max(errors[1:]) < 1e-7
    assert min(error("quantize_per_channel", gradients, dense_small=False)) > 1e-3


def test_rules_choose_bits_and_groups_by_parameter():
    gradients = [[drawn((40, 64), rank), drawn((40, 64), 5 + rank), drawn((40, 64), 9 + rank)] for rank in range(2)]
    rules = {"0": "dense", "1": {"bits": 4, "group_size": 64}}
    dense, four, eight = error("quantize_per_channel", gradients, rules=rules)
    assert dense < 1e-7
    assert 0.05 < four < 0.2
    assert 1e-3 < eight < 0.02
    result = commhub.simulate("quantize_per_channel", gradients, rules=rules)
    assert "residual" in result.states[0].local("1")  # below 8 bits
    assert "residual" not in result.states[0].local("2")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 3}, "bits"),
        ({"group_size": 100}, "multiple of 16"),
        ({"group_size": 0}, "multiple of 16"),
        ({"residual_dtype": "fp8"}, "residual_dtype"),
        ({"rules": {"0": {"bits": 3}}}, "bits is 3"),
        ({"rules": {"0": {"rank": 3}}}, "may set"),
        ({"bits": 2, "stochastic_rounding": True, "error_feedback": True}, "not bounded"),
    ],
)
def test_a_wrong_option_says_what_is_right(options, message):
    with pytest.raises(commhub.HookOptionError, match=message):
        commhub.simulate("quantize_per_channel", [[torch.ones(40, 64)]], **options)


def test_residuals_in_bf16_take_half_the_memory_and_do_their_work():
    gradients = [[drawn((40, 64), rank)] for rank in range(2)]
    run = commhub.simulate("quantize_per_channel", gradients, steps=5, bits=4, residual_dtype="bf16")
    assert run.states[0].local("0")["residual"].dtype == torch.bfloat16
    mean = (gradients[0][0] + gradients[1][0]) / 2
    total = torch.zeros_like(mean)
    for steps in range(1, 21):
        options = {"bits": 4, "residual_dtype": "bf16"}
        total += commhub.simulate("quantize_per_channel", gradients, steps=steps, **options).gradients[0][0]
    assert (total / 20 - mean).norm() < 0.02 * mean.norm()  # one step alone misses a tenth


def as_pytorch_does(gradients):
    """The arithmetic of PyTorch's per-tensor hook: one scale for a whole bucket, every rank's codes on every rank."""
    parts = []
    for rank in gradients:
        flat = torch.cat([g.reshape(-1) for g in rank])
        scale = max(
            float(flat.max().clamp(min=0) - flat.min().clamp(max=0)) / 255, float(torch.finfo(torch.float32).eps)
        )
        zero = min(max(-128 - round(float(flat.min().clamp(max=0)) / scale), -128), 127)
        codes = torch.round(flat / scale + zero).clamp(-128, 127)
        parts.append((codes - zero) * scale)
    mean = sum(parts) / len(parts)
    return [m.view_as(g) for m, g in zip(mean.split([g.numel() for g in gradients[0]]), gradients[0], strict=True)]


def test_against_pytorchs_own_mode():
    """Of the same order where that one is right; right where it loses small gradients."""

    def errors(gradients):
        mean = [sum(same) / len(gradients) for same in zip(*gradients, strict=True)]
        ours = commhub.simulate("quantize_per_tensor", gradients).gradients[0]
        return [
            [float((a - b).norm() / b.norm()) for a, b in zip(got, mean, strict=True)]
            for got in (ours, as_pytorch_does(gradients))
        ]

    (mine,), (theirs,) = errors([[drawn((40, 70), rank)] for rank in range(2)])
    assert mine < 2 * theirs
    mine, theirs = errors([[drawn((40, 70), rank), drawn((40, 70), 5 + rank) * 1e-5] for rank in range(2)])
    assert max(mine) < 0.03
    assert theirs[1] > 0.9
