"""sign: against the plain algorithm in float64, without processes and on real ranks."""

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import commhub
from commhub.testing import bitwise_equal

SHAPES = ((40, 33), (7,), (32, 64))
SIZE = 16


def drawn(rank, step):
    generator = torch.Generator().manual_seed(100 * step + rank)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES]


def signs(group):
    return torch.where(group < 0, -1.0, 1.0).double() * group.abs().mean()


def two_step(p, steps, i):
    """EF-signSGD with both directions compressed, group after group: the last result and the residuals."""
    numel = drawn(0, 0)[i].numel()
    residuals = [torch.zeros(numel, dtype=torch.float64) for _ in range(p)]
    share = -(-numel // (SIZE * p))
    for step in range(steps):
        values = [drawn(rank, step)[i].view(-1) + residuals[rank] for rank in range(p)]
        sent = [torch.cat([signs(group) for group in v.split(SIZE)]) for v in values]
        mean = sum(sent) / p
        result = torch.cat([signs(group) for group in mean.split(SIZE)])
        residuals = [v - s for v, s in zip(values, sent, strict=True)]
        for rank in range(p):
            own = slice(rank * share * SIZE, (rank + 1) * share * SIZE)
            residuals[rank][own] += p * (mean - result)[own]
    return result, residuals


@pytest.mark.parametrize("p", [1, 2, 3])
def test_it_is_the_plain_algorithm(p):
    run = commhub.simulate("sign", drawn, ranks=p, steps=4, group_size=SIZE, start_step=0)
    for i in (0, 2):
        result, residuals = two_step(p, 4, i)
        torch.testing.assert_close(run.gradients[p - 1][i].view(-1), result)
        for rank in range(p):
            torch.testing.assert_close(run.states[rank].local(str(i))["residual"].view(-1), residuals[rank])
    torch.testing.assert_close(run.gradients[0][1], sum(drawn(rank, 3)[1] for rank in range(p)) / p)


def test_the_first_steps_are_exact():
    run = commhub.simulate("sign", drawn, ranks=2, steps=2, start_step=2)
    for i, found in enumerate(run.gradients[0]):
        torch.testing.assert_close(found, (drawn(0, 1)[i] + drawn(1, 1)[i]) / 2)


def test_residuals_stop_growing_where_gradients_are_constant():
    def largest(steps):
        run = commhub.simulate("sign", [[drawn(r, 0)[2]] for r in range(2)], steps=steps, start_step=0)
        return max(float(state.local("0")["residual"].norm()) for state in run.states)

    assert largest(600) < 1.2 * largest(200)


def test_a_residual_is_as_it_was_after_a_step_that_is_not_finite():
    def gradients(rank, step):
        return [drawn(rank, step)[2] * (float("inf") if (rank, step) == (1, 1) else 1.0)]

    before, run = (commhub.simulate("sign", gradients, ranks=2, steps=n, start_step=0) for n in (1, 2))
    for rank in range(2):
        assert not run.gradients[rank][0].isfinite().any()
        assert bitwise_equal(run.states[rank].local("0")["residual"], before.states[rank].local("0")["residual"])


def test_an_option_out_of_range_is_refused_at_once():
    for name, value in (("group_size", 12), ("group_size", 0), ("start_step", -1)):
        with pytest.raises(commhub.HookOptionError, match=name):
            commhub.create("sign", **{name: value})


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
    commhub.register(model, "sign", start_step=0)
    for step in range(4):
        model.zero_grad()
        model(drawn(dist.get_rank(), step)).backward()
    return [p.grad for p in model.parameters()]


@pytest.mark.parametrize("nproc", [2, 4])
def test_real_ranks_and_virtual_ones_agree(ranks, nproc):
    """To the bit: every sum is the hook's own, in rank order."""
    expected = commhub.simulate("sign", drawn, ranks=nproc, steps=4, start_step=0).gradients[0]
    for found in ranks(on_a_rank, nproc):
        for i in (0, 2):
            assert bitwise_equal(found[i], expected[i])


def test_what_a_rule_calls_dense_is_averaged_exactly():
    gradients = [[torch.randn(64, 64), torch.randn(64, 64)] for _ in range(2)]
    run = commhub.simulate("sign", gradients, start_step=0, rules={"0": "dense"})
    assert torch.equal(run.gradients[0][0], (gradients[0][0] + gradients[1][0]) / 2)
    assert not torch.allclose(run.gradients[0][1], (gradients[0][1] + gradients[1][1]) / 2)
    assert list(run.states[0].local("0")) == []
    with pytest.raises(commhub.HookOptionError, match="matches no parameter"):
        commhub.simulate("sign", gradients, rules={"head": "dense"})


@pytest.mark.parametrize("p", [1, 2, 3])
def test_groups_of_8_and_parameters_of_one_group_are_coded(p):
    """The scales lie where their dtype can, however few bytes of signs come before them."""
    values = [torch.full((n,), float(n), dtype=torch.float64) for n in (1, 8, 9, 40)]
    run = commhub.simulate("sign", [values] * p, group_size=8, dense_small=False, start_step=0)
    for found, value in zip(run.gradients[0], values, strict=True):
        torch.testing.assert_close(found, value)
