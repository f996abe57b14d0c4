"""topk: against the papers' algorithm in float64, without processes and on real ranks."""

import math

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import commhub
from commhub.testing import assert_equal_across_ranks, bitwise_equal, mlp, train

SHAPES = ((40, 30), (7,), (25, 64))
SMALL = 100  # elements: the second parameter is averaged exactly


def drawn(rank, step):
    generator = torch.Generator().manual_seed(100 * step + rank)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES]


def momentum_corrected(p, steps, ratio, momentum, start=0):
    """Algorithm 1 with section 3's corrections, one parameter and rank after the other: the last results and v."""
    velocity = [[torch.zeros(shape, dtype=torch.float64).view(-1) for shape in SHAPES] for _ in range(p)]
    waiting = [[v.clone() for v in mine] for mine in velocity]
    for step in range(steps):
        results = [torch.zeros_like(v) for v in velocity[0]]
        for rank in range(p):
            for i, gradient in enumerate(drawn(rank, step)):
                u, v = velocity[rank][i], waiting[rank][i]
                u.mul_(momentum).add_(gradient.view(-1))
                if u.numel() < SMALL or step < start:
                    results[i] += u / p
                    continue
                v += u
                threshold = v.abs().sort(descending=True).values[math.ceil(ratio * v.numel()) - 1]
                mask = v.abs() >= threshold
                results[i][mask] += v[mask] / p
                v[mask] = 0
                u[mask] = 0
    return results, waiting


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("p", [1, 3])
def test_it_is_the_papers_algorithm(p, momentum):
    options = {"ratio": 0.05, "momentum": momentum, "min_numel": SMALL, "start_step": 2}
    run = commhub.simulate("topk", drawn, ranks=p, steps=6, buckets=2, **options)
    results, waiting = momentum_corrected(p, 6, 0.05, momentum, start=2)
    for found, expected in zip(run.gradients[p - 1], results, strict=True):
        torch.testing.assert_close(found.view(-1), expected)
    for rank in range(p):
        for i in (0, 2):
            kept = run.states[rank].local(str(i))["accumulated" if momentum else "residual"]
            torch.testing.assert_close(kept.view(-1), waiting[rank][i])
            assert kept.any()


def test_velocities_stop_where_they_were_sent_and_nowhere_else():
    gradient = torch.zeros(100).index_fill_(0, torch.tensor([3, 50]), 1.0)
    gradient[50] = 2.0
    options = {"ratio": 0.01, "momentum": 0.5, "min_numel": 1, "start_step": 0}
    run = commhub.simulate("topk", [[gradient]], steps=1, **options)
    velocity = run.states[0].local("0")["velocity"]
    assert (velocity[3], velocity[50]) == (1.0, 0.0)


def test_shared_blocks_are_all_sent_once_in_turn_and_add_up():
    """10 of 40 blocks a step: after four steps of a constant gradient nothing that came before the last turn waits."""
    n, p = 64 * 40 + 9, 3
    own = [torch.randn(n, generator=torch.Generator().manual_seed(r), dtype=torch.float64) for r in range(p)]
    mean, total, times = sum(own) / p, torch.zeros(n, dtype=torch.float64), torch.zeros(n)
    for steps in range(1, 5):
        run = commhub.simulate("topk", [[g] for g in own], steps=steps, ratio=0.25, shared=True, start_step=0)
        total += run.gradients[0][0]
        times += run.gradients[0][0] != 0
    assert (times[:-9] == 1).all()
    assert (times[-9:] == 4).all()
    waiting = sum(state.local("0")["residual"] for state in run.states) / p
    torch.testing.assert_close(total + waiting, 4 * mean)


def test_shared_blocks_lie_elsewhere_with_another_seed():
    def where(seed):
        run = commhub.simulate("topk", [[torch.ones(64 * 40)]], ratio=0.25, shared=True, seed=seed, start_step=0)
        return run.gradients[0][0]

    assert torch.equal(where(0), where(0))
    assert not torch.equal(where(0), where(1))


@pytest.mark.parametrize("shared", [True, False])
def test_what_is_not_finite_reaches_all_ranks_though_it_waits_and_leaves_residuals_as_they_were(shared):
    def gradients(rank, step):
        mine = torch.arange(4096.0).roll(rank)
        return [mine if step == 0 or rank == 0 else mine + torch.where(mine % 50 == 3, torch.inf, 0.0)]

    options = {"ranks": 2, "shared": shared, "start_step": 0}
    before, run = (commhub.simulate("topk", gradients, steps=steps, **options) for steps in (1, 2))
    for rank in range(2):
        assert not run.gradients[rank][0].isfinite().all()
        kept, held = (one.states[rank].local("0")["residual"] for one in (before, run))
        assert kept.any()
        assert bitwise_equal(kept, held)


def test_a_mean_that_float16_cannot_hold_leaves_residuals_as_they_were():
    big = torch.zeros(1024, dtype=torch.float16).index_fill_(0, torch.arange(20), 6e4)
    before, run = (commhub.simulate("topk", [[big]], steps=steps, start_step=0) for steps in (1, 2))
    assert run.gradients[0][0].isinf().any()
    kept, held = (one.states[0].local("0")["residual"] for one in (before, run))
    assert kept.any()
    assert bitwise_equal(kept, held)


def test_it_sends_eight_bytes_for_each_element_sent_to_each_other_rank():
    gradients = [[torch.ones(100, 100), torch.ones(10)] for _ in range(4)]
    run = commhub.simulate("topk", gradients, start_step=0)
    assert run.sent_bytes[0] == 3 * 100 * 8 + 2 * 3 / 4 * 10 * 4
    shared = commhub.simulate("topk", gradients, shared=True, start_step=0)
    assert shared.sent_bytes[0] == 2 * 3 / 4 * (64 * 2 + 16 + 10) * 4


def test_an_option_out_of_range_is_refused_at_once():
    for name, value in (("ratio", 0.0), ("ratio", 1.5), ("momentum", 1.0), ("min_numel", 0), ("start_step", -1)):
        with pytest.raises(commhub.HookOptionError, match=name):
            commhub.create("topk", **{name: value})


class Given(torch.nn.Module):
    """Has whatever gradients it is given, and the names that the simulator gives."""

    def __init__(self):
        super().__init__()
        for i, shape in enumerate(SHAPES):
            self.register_parameter(str(i), torch.nn.Parameter(torch.zeros(shape, dtype=torch.float64)))

    def forward(self, gradients):
        return sum((p * g).sum() for p, g in zip(self.parameters(), gradients, strict=True))


HOOKS = ["topk(momentum=0.9, ratio=0.05, min_numel=100, start_step=0)", "topk(shared=true, ratio=0.05, start_step=0)"]


def on_a_rank():
    found = {}
    for hook in HOOKS:
        model = DistributedDataParallel(Given(), bucket_cap_mb=0.01)
        commhub.register(model, hook)
        for step in range(4):
            model.zero_grad()
            model(drawn(dist.get_rank(), step)).backward()
        found[hook] = [p.grad for p in model.parameters()]
    model = DistributedDataParallel(mlp())
    commhub.register(model, "topk", min_numel=8, start_step=0)
    assert_equal_across_ranks(train(model, 3).parameters)
    return found


@pytest.mark.parametrize("nproc", [2, 4])
def test_real_ranks_and_virtual_ones_agree(ranks, nproc):
    """To the bit where the hook sums itself, in rank order; to rounding where Gloo does."""
    results = ranks(on_a_rank, nproc)
    for hook in HOOKS:
        expected = commhub.simulate(hook, drawn, ranks=nproc, steps=4).gradients[0]
        for found in results:
            for i in (0, 2):
                torch.testing.assert_close(found[hook][i], expected[i])
                assert "shared" in hook or bitwise_equal(found[hook][i], expected[i])


def test_what_a_rule_calls_dense_is_averaged_exactly():
    gradients = [[torch.randn(64, 64), torch.randn(64, 64)] for _ in range(2)]
    run = commhub.simulate("topk", gradients, start_step=0, rules={"0": "dense"})
    assert torch.equal(run.gradients[0][0], (gradients[0][0] + gradients[1][0]) / 2)
    assert not torch.allclose(run.gradients[0][1], (gradients[0][1] + gradients[1][1]) / 2)
    assert list(run.states[0].local("0")) == []
    with pytest.raises(commhub.HookOptionError, match="matches no parameter"):
        commhub.simulate("topk", gradients, rules={"head": "dense"})


def test_an_odd_number_of_float64_elements_is_sent_by_a_rank_alone():
    values = torch.arange(5.0, dtype=torch.float64)
    run = commhub.simulate("topk", [[values]], ratio=0.6, min_numel=1, start_step=0)
    assert run.gradients[0][0].tolist() == [0, 0, 2, 3, 4]
