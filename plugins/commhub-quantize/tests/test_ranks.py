"""Quantized gradients on real ranks: many buckets, the simulator's numbers, checkpoints, a loss scaler, memory."""

import gc

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.nn.parallel import DistributedDataParallel

import commhub
from commhub.checkpoint import HookState
from commhub.testing import Branches, assert_equal_across_ranks, bitwise_equal, mlp, train

KB = 1 / 1024
ONE, MANY = 25, 6 * KB  # a layer is 6.4 KiB


def deep(layers=12, width=40):
    return mlp([width] * (layers + 1))


def registered(hook, cap, **options):
    model = DistributedDataParallel(deep(), bucket_cap_mb=cap)
    return model, commhub.register(model, hook, **options)


def many_buckets(hook, steps):
    model, registration = registered(hook, MANY)
    run = train(model, steps)
    for gradients in (run.gradients[0], run.gradients[2], run.gradients[-1]):
        assert_equal_across_ranks(gradients)
    assert_equal_across_ranks(run.parameters)
    buckets = len(model._get_ddp_logging_data()["rebuilt_bucket_sizes"].split(","))
    return registration.step, buckets, registration.stats.compression, run.losses


def test_many_steps_of_twelve_buckets_at_4_bits_end_and_agree(ranks):
    """8 bits are in the table of all hooks."""
    for steps, buckets, compression, losses in ranks(many_buckets, 2, "quantize_per_channel(bits=4)", 40):
        assert steps == 40
        assert buckets == 12
        assert compression > 2
        assert losses[-1] < losses[0]


def drawn(rank, step):
    generator = torch.Generator().manual_seed(100 * step + rank)
    return [torch.randn(shape, generator=generator) for shape in ((40, 64), (9,), (33, 70))]


class Given(torch.nn.Module):
    """Has whatever gradients it is given, and the names that the simulator gives."""

    def __init__(self):
        super().__init__()
        for i, t in enumerate(drawn(0, 0)):
            self.register_parameter(str(i), torch.nn.Parameter(torch.zeros(t.shape)))

    def forward(self, gradients):
        return sum((p * g).sum() for p, g in zip(self.parameters(), gradients, strict=True))


def given_gradients(hook, steps):
    model = DistributedDataParallel(Given())
    commhub.register(model, hook)
    for step in range(steps):
        model.zero_grad()
        model(drawn(dist.get_rank(), step)).backward()
    return [p.grad for p in model.parameters()]


@pytest.mark.parametrize("nproc", [2, 4])
@pytest.mark.parametrize("hook", ["quantize_per_channel(bits=4)", "quantize_per_tensor(error_feedback=true)"])
def test_real_ranks_and_virtual_ones_agree(ranks, nproc, hook):
    """To the bit: every sum is the hook's own, in rank order."""
    real = ranks(given_gradients, nproc, hook, 3)
    virtual = commhub.simulate(hook, drawn, ranks=nproc, steps=3).gradients
    for mine, theirs in zip(real, virtual, strict=True):
        for a, b in zip(mine, theirs, strict=True):
            assert bitwise_equal(a, b)


def unused(both_on):
    model = DistributedDataParallel(Branches(40), find_unused_parameters=True)
    registration = commhub.register(model, "quantize_per_channel", bits=4, dense_small=True)
    rank, p = dist.get_rank(), dist.get_world_size()
    given, got = torch.zeros(1600, dtype=torch.float64), torch.zeros(1600, dtype=torch.float64)
    for step in range(6):
        model.zero_grad()
        x = torch.randn(4, 40, generator=torch.Generator().manual_seed(10 * step + rank))
        uses = step % 2 == 0 or rank in both_on
        loss = model(x, both=uses).square().mean()
        own = torch.autograd.grad(loss, model.module.unused.weight, retain_graph=True)[0] if uses else None
        loss.backward()
        mine = torch.zeros(1600, dtype=torch.float64) if own is None else own.double().view(-1)
        dist.all_reduce(mine)
        given += mine / p
        gradient = model.module.unused.weight.grad
        if gradient is not None:
            got += gradient.double().view(-1)
    left = registration.state_dict()["local"][f"rank{rank}"]["unused.weight"]["residual"].double().view(-1)
    dist.all_reduce(left)
    torch.testing.assert_close(got + left / p, given, rtol=0, atol=1e-6)


@pytest.mark.parametrize("both_on", [(), (0,), (1,)])
def test_nothing_is_lost_where_some_ranks_do_not_use_a_parameter(ranks, both_on):
    """Who sums a row owes what its second rounding missed, whether it used the parameter or not."""
    ranks(unused, 2, both_on)


def save(path, hook):
    model, registration = registered(hook, MANY)
    train(model, 5)
    dcp.save({"hook": HookState(registration)}, checkpoint_id=path)
    state, weights = registration.state_dict(), {k: v.clone() for k, v in model.module.state_dict().items()}
    return state, weights, train(model, 3).gradients


def load(path, hook, weights, cap):
    model, registration = registered(hook, cap)
    dcp.load({"hook": HookState(registration)}, checkpoint_id=path)
    model.module.load_state_dict(weights)
    assert registration.step == 5
    return registration.state_dict(), train(model, 3).gradients


def test_it_resumes_with_other_buckets_bit_for_bit_on_more_than_two_ranks(ranks, tmp_path):
    """New processes, two ranks and 4 bits are in the table of all hooks."""
    hook = "quantize_per_channel(error_feedback=true)"
    before = ranks(save, 3, str(tmp_path), hook)
    after = ranks(load, 3, str(tmp_path), hook, before[0][1], ONE)
    for rank, ((saved, _, went_on), (loaded, resumed)) in enumerate(zip(before, after, strict=True)):
        for name, table in saved["local"][f"rank{rank}"].items():
            assert table["residual"].any()
            assert bitwise_equal(loaded["local"][f"rank{rank}"][name]["residual"], table["residual"])
        for mine, theirs in zip(went_on, resumed, strict=True):
            for name, gradient in mine.items():
                if name.endswith("weight"):  # sums of codes are in rank order, so that any number of ranks resumes
                    assert bitwise_equal(gradient, theirs[name]), name


def grows(hook):
    model, _ = registered(hook, MANY)
    sizes = []
    for _ in range(3):
        train(model, 10)
        gc.collect()
        sizes.append(sum(t.nbytes for t in gc.get_objects() if type(t) is torch.Tensor))
    return sizes


def test_memory_does_not_grow_with_the_steps(ranks):
    for first, _, last in ranks(grows, 2, "quantize_per_channel(bits=4)"):
        assert last <= 1.02 * first
