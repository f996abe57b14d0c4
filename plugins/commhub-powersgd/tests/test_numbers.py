"""What must hold of the numbers: exact for low rank, finite again after Inf, every kind of parameter."""

import math
import os

import pytest
import torch
from commhub_powersgd import PowerSGD
from commhub_powersgd._orthogonal import orthogonalize, renew

import commhub


def seeded(*key):
    return torch.Generator().manual_seed(hash(key) % 2**31)


def low_rank(n, m, k, generator):
    return torch.randn(n, k, generator=generator) @ torch.randn(k, m, generator=generator)


def error(result, mean):
    got = result.gradients[0][0].double()
    return ((got - mean.double()).norm() / mean.double().norm()).item()


def run(gradients, **options):
    return commhub.simulate("powersgd", gradients, **{"start_step": 0, "min_compression_rate": 0.1, **options})


def around(mean, p, scale=1.0):
    """p full-rank gradients whose mean is ``mean``, and which differ a lot."""
    noise = [scale * torch.randn(mean.shape, generator=seeded(i)) for i in range(p)]
    middle = sum(noise) / p
    return [[mean + x - middle] for x in noise]


# Any rank at or below r is reproduced.


@pytest.mark.usefixtures("every_way")
@pytest.mark.parametrize(("rank", "true_rank"), [(r, k) for r in range(1, 5) for k in range(1, r + 1)])
@pytest.mark.parametrize("shape", [(64, 48), (20, 300), (300, 20)])
def test_a_mean_of_rank_at_most_r_is_reproduced(rank, true_rank, shape):
    """Also one whose rank is lower: bare Gram-Schmidt returns twice a rank-1 gradient at rank 2."""
    mean = low_rank(*shape, true_rank, seeded(rank, true_rank))
    for p in (1, 2):
        assert error(run(around(mean, p), rank=rank), mean) < 1e-4
    for steps in (2, 5):
        result = run([[mean], [mean]], rank=rank, steps=steps)
        assert error(result, mean) < 1e-4


@pytest.mark.parametrize("gap", [1e-2, 1e-4, 1e-6, 0.0])
def test_near_collinear_columns_are_reproduced(gap):
    generator = seeded(1)
    a, b = torch.randn(64, 1, generator=generator), torch.randn(64, 1, generator=generator)
    mean = torch.cat([a, a + gap * b], 1) @ torch.randn(2, 50, generator=generator)
    for steps in (1, 2, 4):
        assert error(run([[mean]] * 2, rank=2, steps=steps), mean) < 1e-4


def test_after_a_while_at_a_lower_rank_a_higher_one_is_reproduced_at_once():
    """Of a rank-1 gradient nothing is left for the second column, but it must not forget where to look."""
    one, two = low_rank(64, 48, 1, seeded(1)), low_rank(64, 48, 2, seeded(2))
    result = run(lambda rank, step: [two if step == 6 else one], ranks=2, steps=7, rank=2)
    assert error(result, two) < 1e-4


def test_after_a_while_at_zero_a_gradient_is_reproduced_at_once():
    """Its first rows stay zero, where an arbitrary direction would look."""
    mean = low_rank(64, 48, 2, seeded(1))
    mean[:8] = 0
    result = run(lambda rank, step: [mean if step == 3 else torch.zeros(64, 48)], ranks=2, steps=4, rank=2)
    assert error(result, mean) < 1e-4


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e-6, 1e6, 1e30])
@pytest.mark.parametrize("rank", [1, 2, 4])
def test_tiny_and_huge_gradients_are_no_different(scale, rank):
    mean = low_rank(64, 48, rank, seeded(rank)) * scale
    for steps in (1, 3):
        assert error(run([[mean]] * 2, rank=rank, steps=steps), mean) < 1e-4


def test_a_change_of_scale_is_followed():
    mean = low_rank(64, 48, 2, seeded(3))
    scales = [1e-25, 1e20, 1.0, 1e-30]
    for steps in range(1, 5):
        result = run(lambda rank, step: [mean * scales[step]], ranks=2, steps=steps, rank=2, error_feedback=False)
        assert error(result, mean * scales[steps - 1]) < 1e-4


@pytest.mark.parametrize("rank", [1, 2, 4])
@pytest.mark.parametrize("make", [torch.zeros, torch.ones], ids=["zero", "collinear"])
def test_orthogonal_vectors_come_out_whatever_goes_in(make, rank):
    p = orthogonalize(make(1, rank, 50), torch.rand(1, rank, 50, generator=seeded(0)) - 0.5)[0]
    torch.testing.assert_close(p @ p.T, torch.eye(rank))


def test_a_factor_is_renewed_where_it_has_a_direction():
    q = torch.tensor([[3.0, -6.0], [1e-8, 1e-7], [0.0, 0.0]])
    former = torch.ones(3, 2)
    assert renew(q, former).tolist() == [[0.5, -1.0], [1.0, 1.0], [1.0, 1.0]]
    assert torch.equal(renew(torch.zeros(3, 2), former), former)


# Zero stays zero.


@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("warm_start", [True, False])
def test_a_gradient_that_was_always_zero_stays_exactly_zero(rank, warm_start):
    grads = [[torch.zeros(32, 24), torch.randn(32, 24, generator=seeded(r))] for r in range(2)]
    for steps in (1, 2, 50):
        result = run(grads, rank=rank, steps=steps, warm_start=warm_start)
        assert result.gradients[0][0].count_nonzero() == 0
        assert result.gradients[0][0].isfinite().all()
        assert result.states[1].local("0")["residual"].count_nonzero() == 0


# One non-finite step.


@pytest.mark.parametrize(
    ("place", "bad"), [(0, 3e38), *((i, x) for i in (0, 1) for x in (math.inf, -math.inf, math.nan))]
)
@pytest.mark.parametrize("where", [0, 1])
@pytest.mark.parametrize("buckets", [1, 2])
@pytest.mark.parametrize("options", [{}, {"error_feedback": False, "warm_start": False}], ids=["state", "stateless"])
def test_a_non_finite_step_reaches_all_ranks_and_leaves_no_trace(bad, place, where, buckets, options):
    def grads(rank, step):
        made = [torch.randn(s, generator=seeded(rank, step)) for s in [(40, 30), (9,), (24, 32)]]
        if step == 2 and rank == where:
            made[place].view(-1)[5:9] = bad
        return made

    options = {**options, "rank": 2, "buckets": buckets, "ranks": 2}
    broken = run(grads, steps=3, **options)
    for mine in broken.gradients:
        assert not mine[place].isfinite().all()
    untouched = run(grads, steps=2, **options)
    for broke, kept in zip(broken.states, untouched.states, strict=True):
        assert_same_tables(broke.export("shared"), kept.export("shared"))
        same_bucket = {"0", "2"} if buckets == 1 else {"0"} if place == 0 else {"2"}
        ours, theirs = broke.export("local"), kept.export("local")
        assert_same_tables(*({i: t for i, t in tables.items() if i in same_bucket} for tables in (ours, theirs)))
    after = run(grads, steps=4, **options)
    for mine in after.gradients:
        assert all(g.isfinite().all() and g.abs().max() < 100 for g in mine)


@pytest.mark.usefixtures("every_way")
def test_a_non_finite_matrix_spoils_its_result_on_every_rank():
    grads = [[torch.ones(40, 30)], [torch.ones(40, 30)]]
    grads[1][0][3, 3] = math.inf
    result = run(grads)
    assert all(mine[0].isnan().all() for mine in result.gradients)


def test_a_factor_that_overflows_counts_as_non_finite():
    """Each gradient is a number, M Q is none."""
    grads = [[torch.full((40, 30), 2e38)]] * 2
    result = run(lambda rank, step: grads[0] if step == 0 else [torch.ones(40, 30)], ranks=2, steps=2)
    assert not run(grads).gradients[0][0].isfinite().any()
    assert error(result, torch.ones(40, 30)) < 1e-4


# Residuals.


@pytest.mark.parametrize("rank", [1, 2])
def test_residuals_stay_bounded_when_ranks_pull_in_opposite_directions(rank):
    """The mean is zero and says nothing about where to look; a fixed look would let the rest grow for ever."""
    gradient = torch.randn(16, 24, generator=seeded(4))
    sizes = []
    for steps in (100, 400):
        result = run([[gradient], [-gradient]], rank=rank, steps=steps)
        sizes += [state.local("0")["residual"].norm() / gradient.norm() for state in result.states]
        assert result.gradients[0][0].abs().max() < 1e-3
    assert max(sizes) < 2 * 16


def test_residuals_stay_bounded_when_opposite_gradients_vary():
    def grads(rank, step):
        return [(1 - 2 * rank) * torch.randn(16, 24, generator=seeded(step))]

    result = run(grads, ranks=2, steps=2000 if os.environ.get("COMMHUB_EVERY_CHECK") else 500)
    assert result.states[0].local("0")["residual"].norm() < 2 * 16 * math.sqrt(16 * 24)


def test_residuals_stay_bounded_when_all_ranks_pull_alike():
    gradient = torch.randn(16, 24, generator=seeded(5))
    result = run([[gradient]] * 2, steps=500)
    assert result.states[0].local("0")["residual"].norm() < 2 * 16 * gradient.norm()


# Every kind of parameter.

KINDS = {
    "scalar": torch.randn((), generator=seeded(1)),
    "empty": torch.zeros(0, 3),
    "vector": torch.randn(5, generator=seeded(2)),
    "wide": torch.randn(1, 90, generator=seeded(2)),
    "matrix": low_rank(40, 30, 1, seeded(3)),
    "bf16": low_rank(40, 30, 1, seeded(4)).bfloat16(),
    "fp16": low_rank(40, 30, 1, seeded(5)).half(),
    "fp64": low_rank(40, 30, 1, seeded(6)).double(),
    "complex64": torch.randn(20, 20, dtype=torch.complex64, generator=seeded(7)),
    "complex128": torch.randn(20, 20, dtype=torch.complex128, generator=seeded(8)),
    "channels_last": low_rank(16, 8 * 9, 1, seeded(9)).view(16, 8, 3, 3).contiguous(memory_format=torch.channels_last),
    "transposed": low_rank(40, 30, 1, seeded(10)).t(),
    "cube": low_rank(16, 60, 1, seeded(11)).view(16, 5, 12),
    "permuted": low_rank(16, 60, 1, seeded(11)).view(16, 5, 12).permute(2, 0, 1),
}


@pytest.mark.parametrize("buckets", [1, 3, 20])
@pytest.mark.parametrize("steps", [1, 3])
def test_every_kind_of_parameter_comes_back_as_its_mean(buckets, steps):
    """All of rank 1, so that they are reproduced to the precision of their own dtype."""
    grads = list(KINDS.values())
    result = commhub.simulate("powersgd", [grads, grads], start_step=0, steps=steps, buckets=buckets)
    for (name, want), got, other in zip(KINDS.items(), *result.gradients, strict=True):
        assert (got.dtype, got.shape, got.stride()) == (want.dtype, want.shape, want.stride()), name
        assert got is other, name
        tolerance = {torch.bfloat16: 0.03, torch.float16: 5e-3}.get(want.dtype, 1e-4)
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance, msg=lambda m, name=name: f"{name}: {m}")


def test_what_is_compressed_depends_on_shape_and_dtype():
    grads = list(KINDS.values())
    state = commhub.simulate("powersgd", [grads, grads], start_step=0).states[0]
    compressed = {name for i, name in enumerate(KINDS) if "q" in state.shared(str(i))}
    dense = {"scalar", "empty", "vector", "wide", "complex64", "complex128"}
    assert compressed == KINDS.keys() - dense
    for i, (name, gradient) in enumerate(KINDS.items()):
        if name in compressed:
            residual, wide = state.local(str(i))["residual"], torch.promote_types(gradient.dtype, torch.float32)
            assert (residual.dtype, residual.shape) == (wide, gradient.shape)
            assert state.shared(str(i))["q"].dtype == wide


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bit_gradients_lose_nothing_in_the_factors(dtype):
    """Residuals and factors are in float32: what was given arrives, though one step's gradient rounds."""
    gradient = torch.randn(32, 32, generator=seeded(12)).to(dtype)
    hook = Recording(rank=4, start_step=0, min_compression_rate=0.1)
    result = commhub.simulate(hook, [[gradient]] * 2, steps=40)
    outputs = result.hooks[0].outputs
    assert all(output.dtype == dtype for output in outputs)
    left = result.states[0].local("0")["residual"]
    assert left.dtype == torch.float32
    total = sum(output.float() for output in outputs).view(32, 32) + left
    assert (total / 40 - gradient.float()).abs().max() < {torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]


class Recording(PowerSGD):
    """Keeps what came out of each step."""

    def prepare(self, setup):
        self.outputs = []
        super().prepare(setup)

    def reduce(self, bucket):
        yield from super().reduce(bucket)
        self.outputs.append(bucket.flat.clone())


# Ranks, buckets, random numbers.


@pytest.mark.usefixtures("passes")
@pytest.mark.parametrize("rank", [1, 2, 3, 9])
def test_neither_results_nor_state_depend_on_the_buckets(rank):
    """Odd sizes shift everything behind them off the aligned addresses that a sum may depend on."""
    shapes = [(64, 33), (7,), (33, 80), (5,), (100, 257), (3,), (600, 1024), (1,), *[(50, 513)] * 3]

    def grads(r, step):
        made = [torch.randn(s, generator=seeded(r, step, i)) for i, s in enumerate(shapes)]
        made.append(torch.randn(48, 16, 3, 3, generator=seeded(r)).contiguous(memory_format=torch.channels_last))
        return made

    one, *others = (run(grads, ranks=2, steps=3, rank=rank, buckets=b) for b in (1, 2, 5, 12))
    for other in others:
        for mine, theirs in zip(one.gradients[0], other.gradients[0], strict=True):
            assert torch.equal(mine, theirs)
        for a, b in zip(one.states, other.states, strict=True):
            assert_same_state(a, b)


def assert_same_state(a, b):
    for scope in ("local", "shared"):
        assert_same_tables(a.export(scope), b.export(scope))


def assert_same_tables(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, table in ours.items():
        assert table.keys() == theirs[name].keys()
        assert all(torch.equal(table[key], theirs[name][key]) for key in table)


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_all_ranks_hold_the_same_result_and_the_same_factors(ranks):
    def grads(rank, step):
        return [torch.randn(40, 30, generator=seeded(rank, step)), torch.randn(9, generator=seeded(rank))]

    result = run(grads, ranks=ranks, steps=4, rank=2)
    first = result.states[0].export("shared")
    for mine, state in zip(result.gradients, result.states, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, result.gradients[0], strict=True))
        assert all(torch.equal(table["q"], first[name]["q"]) for name, table in state.export("shared").items())


def test_the_global_generator_is_left_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    grads = [[torch.ones(40, 30)]] * 2
    for warm_start in (True, False):
        run(grads, steps=3, rank=2, warm_start=warm_start)
    assert torch.equal(before, torch.get_rng_state())


def test_the_start_depends_on_the_seed_and_not_on_the_global_one():
    grads = [[torch.randn(40, 30, generator=seeded(1))]] * 2

    def starting(seed):
        torch.manual_seed(seed * 7)
        return run(grads, steps=1, seed=seed).gradients[0][0]

    assert torch.equal(starting(1), run(grads, steps=1, seed=1).gradients[0][0])
    assert not torch.equal(starting(1), starting(2))


def test_without_warm_start_each_step_starts_afresh():
    grads = [[torch.randn(40, 30, generator=seeded(1))]] * 2
    options = {"warm_start": False, "error_feedback": False}
    first, second = (run(grads, steps=steps, **options).gradients[0][0] for steps in (1, 2))
    assert not torch.equal(first, second)
    assert "q" not in run(grads, **options).states[0].shared("0")


def test_with_warm_start_a_constant_gradient_is_approximated_ever_better():
    grads = [[torch.randn(40, 30, generator=seeded(1))]] * 2
    best = torch.linalg.svdvals(grads[0][0])[2:].norm() / grads[0][0].norm()
    late = error(run(grads, steps=100, rank=2, error_feedback=False), grads[0][0])
    assert error(run(grads, steps=1, rank=2, error_feedback=False), grads[0][0]) > late
    assert late == pytest.approx(best.item(), rel=1e-2)


@pytest.mark.usefixtures("passes")
@pytest.mark.parametrize("rank", [1, 2, 12])
def test_batching_same_shapes_changes_nothing(rank):
    """Three of one shape evenly spaced, one apart, two of another shape."""
    shapes = [(40, 30), (3,), (40, 30), (3,), (40, 30), (50, 20), (9, 2), (40, 30), (50, 20)]

    def grads(r, step):
        return [torch.randn(s, generator=seeded(r, step, i)) for i, s in enumerate(shapes)]

    alone, together = (run(grads, ranks=2, steps=3, rank=rank, batch_same_shapes=batched) for batched in (False, True))
    for mine, theirs in zip(alone.gradients[0], together.gradients[0], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    assert alone.sent_bytes == together.sent_bytes


@pytest.mark.parametrize("wire", ["fp16", "bf16"])
def test_factors_may_travel_in_sixteen_bits(wire):
    mean = low_rank(40, 30, 1, seeded(1))
    result = run([[mean, torch.ones(9)]] * 2, steps=2, wire=wire)
    assert error(result, mean) < 0.02
    assert result.sent_bytes == (2 * 2 * (70 + 9),) * 2


def test_an_object_is_simulated_like_its_name():
    gradients = [[torch.randn(16, 24, generator=torch.Generator().manual_seed(rank))] for rank in range(2)]
    by_name = commhub.simulate("powersgd(rank=2, start_step=0)", gradients)
    by_object = commhub.simulate(PowerSGD(rank=2, start_step=0), gradients)
    assert torch.equal(by_name.gradients[0][0], by_object.gradients[0][0])
