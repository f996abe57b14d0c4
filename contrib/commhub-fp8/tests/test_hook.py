"""fp8: against the plain algorithm in float64 and the format's own table, without processes and on real ranks."""

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import commhub
from commhub.testing import bitwise_equal

SHAPES = ((40, 33), (7,), (32, 64))
SIZE = 16


def number(code):
    """What a byte of e4m3 means: a sign, four bits of exponent (bias 7), three of mantissa; all ones is no number."""
    sign, exponent, mantissa = -1 if code & 128 else 1, code >> 3 & 15, code & 7
    if exponent == 15 and mantissa == 7:
        return float("nan")
    if exponent == 0:
        return sign * mantissa * 2.0**-9
    return sign * (8 + mantissa) * 2.0 ** (exponent - 10)


TABLE = torch.tensor([number(code) for code in range(127)], dtype=torch.float64)  # what is not negative, ascending


def nearest(values):
    """The number of the table that comes nearest; of two as near, the one with an even code."""
    upper = torch.searchsorted(TABLE, values.abs()).clamp(max=126)
    lower = (upper - 1).clamp(min=0)
    below, above = values.abs() - TABLE[lower], TABLE[upper] - values.abs()
    down = (below < above) | ((below == above) & (lower % 2 == 0))
    return torch.where(down, TABLE[lower], TABLE[upper]) * values.sign()


def coded(values):
    """What codes stand for, group after group."""
    scales = [group.abs().max() / 448 for group in values.split(SIZE)]
    return torch.cat([nearest(g / s) * s if s else g * 0 for g, s in zip(values.split(SIZE), scales, strict=True)])


def drawn(rank, step):
    """Cubes, so that magnitudes lie far apart."""
    generator = torch.Generator().manual_seed(100 * step + rank)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) ** 3 for shape in SHAPES]


def test_the_table_is_the_formats():
    assert (TABLE[-1], TABLE[1], len(TABLE.unique())) == (448, 2**-9, 127)
    assert torch.equal(torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).double(), TABLE)


@pytest.mark.parametrize("p", [1, 2, 3])
def test_a_step_is_the_plain_algorithm(p):
    run = commhub.simulate("fp8", drawn, ranks=p, group_size=SIZE)
    for i in (0, 2):
        values = [drawn(rank, 0)[i].view(-1) for rank in range(p)]
        mean = sum(map(coded, values)) / p
        result = coded(mean)
        torch.testing.assert_close(run.gradients[p - 1][i].view(-1), result)
        kept = [run.states[rank].local(str(i))["residual"].view(-1) for rank in range(p)]
        owed = [residual - (v - coded(v)) for residual, v in zip(kept, values, strict=True)]
        torch.testing.assert_close(sum(owed), p * (mean - result))
        assert ((torch.stack(owed).abs() > 1e-12).sum(0) <= 1).all()  # one rank owes it
    torch.testing.assert_close(run.gradients[0][1], sum(drawn(rank, 0)[1] for rank in range(p)) / p)


def test_what_was_not_sent_is_sent_later():
    run = commhub.simulate("fp8", drawn, ranks=1, steps=5, group_size=SIZE)
    for i in (0, 2):
        residual = torch.zeros_like(drawn(0, 0)[i].view(-1))
        for step in range(5):
            values = drawn(0, step)[i].view(-1) + residual
            result = coded(coded(values))
            residual = values - result
        torch.testing.assert_close(run.gradients[0][i].view(-1), result)
        torch.testing.assert_close(run.states[0].local(str(i))["residual"].view(-1), residual)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_largest_of_a_group_saturates_and_small_ones_keep_their_digits(dtype):
    """However 1 / (max / 448) is rounded, the largest comes out as itself and not as NaN."""
    values = torch.randn(64, 512, generator=torch.Generator().manual_seed(0))
    values = (values * torch.logspace(-30, 30, 64)[:, None]).to(dtype)
    found = commhub.simulate("fp8", [[values]], error_feedback=False).gradients[0][0]
    assert found.isfinite().all()
    near = values.abs() > values.abs().amax(1, keepdim=True) * 2**-14
    assert ((found - values).abs()[near] <= values.abs()[near] / 12).all()  # twice rounded, and in bfloat16 once more


@pytest.mark.parametrize("bad", [float("inf"), -float("inf"), float("nan")])
def test_what_is_not_finite_reaches_all_ranks_and_no_residual(bad):
    def gradients(rank, step):
        found = drawn(rank, step)[2].float()
        if (rank, step) == (1, 1):
            found[3, 5] = bad
        return [found]

    before, run = (commhub.simulate("fp8", gradients, ranks=3, steps=n) for n in (1, 2))
    for rank in range(3):
        assert not run.gradients[rank][0][3, 5].isfinite()
        kept, held = (one.states[rank].local("0")["residual"] for one in (before, run))
        assert kept.any()
        assert bitwise_equal(kept, held)


def test_an_option_out_of_range_is_refused_at_once():
    for name, value in (("group_size", 24), ("group_size", 0), ("start_step", -1)):
        with pytest.raises(commhub.HookOptionError, match=name):
            commhub.create("fp8", **{name: value})


def test_it_sends_a_byte_for_an_element_and_a_scale_for_each_group():
    run = commhub.simulate("fp8", [[torch.ones(256, 256), torch.ones(10)]] * 4)
    assert run.sent_bytes[0] == 2 * 3 / 4 * (256 * 256 * (1 + 4 / 512) + 10 * 4)


class Given(torch.nn.Module):
    """Has whatever gradients it is given, and the names that the simulator gives."""

    def __init__(self):
        super().__init__()
        for i, shape in enumerate(SHAPES):
            self.register_parameter(str(i), torch.nn.Parameter(torch.zeros(shape, dtype=torch.float64)))

    def forward(self, gradients):
        return sum((p * g).sum() for p, g in zip(self.parameters(), gradients, strict=True))


def on_a_rank():
    model = DistributedDataParallel(Given(), bucket_cap_mb=0.01)
    commhub.register(model, "fp8")
    for step in range(4):
        model.zero_grad()
        model(drawn(dist.get_rank(), step)).backward()
    return [p.grad for p in model.parameters()]


@pytest.mark.parametrize("nproc", [2, 4])
def test_real_ranks_and_virtual_ones_agree(ranks, nproc):
    """To the bit: every sum is the hook's own, in rank order."""
    expected = commhub.simulate("fp8", drawn, ranks=nproc, steps=4).gradients[0]
    for found in ranks(on_a_rank, nproc):
        for i in (0, 2):
            assert bitwise_equal(found[i], expected[i])


def test_what_a_rule_calls_dense_or_comes_before_the_start_is_averaged_exactly():
    gradients = [[torch.randn(64, 64), torch.randn(64, 64)] for _ in range(2)]
    run = commhub.simulate("fp8", gradients, rules={"0": "dense"})
    assert torch.equal(run.gradients[0][0], (gradients[0][0] + gradients[1][0]) / 2)
    assert not torch.equal(run.gradients[0][1], (gradients[0][1] + gradients[1][1]) / 2)
    run = commhub.simulate("fp8", gradients, steps=2, start_step=2)
    assert torch.equal(run.gradients[0][1], (gradients[0][1] + gradients[1][1]) / 2)
