"""PowerSGD on real ranks: many buckets, unused parameters, agreement with the simulator, the start step."""

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

import commhub
from commhub.testing import Branches, assert_equal_across_ranks, bitwise_equal, mlp, train

KB = 1 / 1024


def deep(layers=12, width=24):
    return mlp([width] * (layers + 1))


def many_buckets(hook, steps):
    model = DistributedDataParallel(deep(), bucket_cap_mb=2 * KB)
    registration = commhub.register(model, hook, start_step=3, min_compression_rate=1)
    run = train(model, steps)
    for gradients in (run.gradients[0], run.gradients[2], run.gradients[3], run.gradients[-1]):
        assert_equal_across_ranks(gradients)
    assert_equal_across_ranks(run.parameters)
    state = registration.state_dict()
    assert_equal_across_ranks({name: table["q"] for name, table in state["shared"].items()})
    return registration.step, registration.stats.compression, len(state["shared"]), run.losses


def test_steps_before_and_after_the_start_step_end_and_agree_in_twelve_buckets(ranks):
    """A hundred steps, compressed from the first, are in the table of all hooks."""
    for steps, compression, matrices, losses in ranks(many_buckets, 2, "powersgd_rank2", 20):
        assert steps == 20
        assert matrices == 12
        assert compression > 3
        assert losses[-1] < losses[0]


def ended(hook):
    model = DistributedDataParallel(deep(), bucket_cap_mb=2 * KB)
    registration = commhub.register(model, hook, start_step=0, min_compression_rate=1)
    train(model, 3)
    worker = registration.hook
    held = [plan for plan in vars(worker).values() if isinstance(plan, commhub.toolkit.PerBucket) and plan.made]
    registration.remove()
    return len(held), [plan.made for plan in held]


def test_when_a_registration_ends_no_memory_of_ddps_is_held(ranks):
    """Views of buckets are kept between steps, and whoever keeps the registration would keep the gradients."""
    assert ranks(ended, 2, "powersgd") == [(1, [{}])] * 2


def unused(both_on):
    model = DistributedDataParallel(Branches(24), find_unused_parameters=True)
    registration = commhub.register(model, "powersgd", start_step=0, min_compression_rate=1)
    rank = torch.distributed.get_rank()
    waiting = []
    for step in range(4):
        model.zero_grad()
        x = torch.randn(4, 24, generator=torch.Generator().manual_seed(10 * step + rank))
        model(x, both=step % 2 == 0 or rank in both_on).square().mean().backward()
        assert_equal_across_ranks({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
        [mine] = registration.state_dict()["local"].values()
        waiting.append(mine["unused.weight"]["residual"])
    return waiting


@pytest.mark.parametrize("both_on", [(), (0,)])
def test_the_residual_of_an_unused_parameter_waits(ranks, both_on):
    for rank, waiting in enumerate(ranks(unused, 2, both_on)):
        for before, after in ((0, 1), (2, 3)):
            assert bitwise_equal(waiting[before], waiting[after]) == (rank not in both_on)
        assert waiting[0].count_nonzero() > 0


SHAPES = [(40, 30), (7,), (24, 8, 3, 3), (3, 4), (25, 60), ()]


def gradients(rank, step):
    generator = torch.Generator().manual_seed(1000 * rank + step)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


class Given(torch.nn.Module):
    """Parameters whose gradients are what ``gradients`` says."""

    def __init__(self):
        super().__init__()
        for i, shape in enumerate(SHAPES):
            self.register_parameter(str(i), torch.nn.Parameter(torch.zeros(shape)))  # the simulator's names

    def forward(self, rank, step):
        return sum((p * g).sum() for p, g in zip(self.parameters(), gradients(rank, step), strict=True))


def reduced(steps):
    torch.set_num_threads(1)
    model = DistributedDataParallel(Given())
    registration = commhub.register(model, "powersgd_rank2", start_step=0)
    for step in range(steps):
        model.zero_grad()
        model(torch.distributed.get_rank(), step).backward()
    return [p.grad for p in model.parameters()], registration.stats.sent_bytes


@pytest.mark.parametrize("nproc", [1, 2, 4])
def test_the_simulator_agrees_with_real_ranks(ranks, nproc):
    """Bit by bit where two numbers are summed at most; else their order differs."""
    simulated = commhub.simulate("powersgd_rank2", gradients, ranks=nproc, steps=3, start_step=0, buckets=2)
    for grads, sent in ranks(reduced, nproc, 3):
        assert sent == pytest.approx(simulated.sent_bytes[0])
        for real, virtual in zip(grads, simulated.gradients[0], strict=True):
            if nproc <= 2:
                assert bitwise_equal(real, virtual)
            else:
                torch.testing.assert_close(real, virtual, rtol=1e-3, atol=1e-4)
