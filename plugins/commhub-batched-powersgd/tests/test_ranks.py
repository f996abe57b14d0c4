"""Batched PowerSGD on real ranks: many buckets, unused parameters, agreement with the simulator, resumption."""

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

import commhub
from commhub.testing import Branches, assert_equal_across_ranks, bitwise_equal, mlp, train

KB = 1 / 1024


def deep(layers=12, width=24):
    return mlp([width] * (layers + 1))


def tensors_of(registration):
    """All that is remembered, as {where: tensor}."""
    state = registration.state_dict()
    return {
        f"{scope} {name} {key}": tensor
        for scope, tables in (("shared", state["shared"]), *state["local"].items())
        for name, table in tables.items()
        for key, tensor in table.items()
    }


def many_steps(hook, steps):
    model = DistributedDataParallel(deep(), bucket_cap_mb=2 * KB)
    registration = commhub.register(model, hook)
    run = train(model, steps)
    for gradients in (*run.gradients[:5], run.gradients[-1]):
        assert_equal_across_ranks(gradients)
    assert_equal_across_ranks(run.parameters)
    assert_equal_across_ranks({k: t for k, t in tensors_of(registration).items() if k.startswith("shared")})
    return registration.stats.compression, len(registration.hook._squares.made), run.losses


def test_two_iterations_from_the_fourth_step_on_end_and_all_ranks_agree(ranks):
    """In twelve buckets; one iteration from the first step on is in the table of all hooks."""
    hook = "batched_powersgd_rank2(start_step=3, num_power_iterations=2)"
    for compression, squares, losses in ranks(many_steps, 2, hook, 40):
        assert compression > 2
        assert squares == 12
        assert losses[-1] < losses[0]


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
    registration = commhub.register(model, "batched_powersgd_rank2", start_step=0)
    for step in range(steps):
        model.zero_grad()
        model(torch.distributed.get_rank(), step).backward()
    return [p.grad for p in model.parameters()], registration.stats.sent_bytes


@pytest.mark.parametrize("nproc", [1, 2, 4])
def test_the_simulator_agrees_with_real_ranks(ranks, nproc):
    """Bit by bit where two numbers are summed at most; else their order differs."""
    simulated = commhub.simulate("batched_powersgd_rank2", gradients, ranks=nproc, steps=3, start_step=0)
    for grads, sent in ranks(reduced, nproc, 3):
        assert sent == pytest.approx(simulated.sent_bytes[0])
        for real, virtual in zip(grads, simulated.gradients[0], strict=True):
            if nproc <= 2:
                assert bitwise_equal(real, virtual)
            else:
                torch.testing.assert_close(real, virtual, rtol=1e-3, atol=1e-4)


def unused(both_on, steps):
    """A parameter that some ranks use in some steps; what was given, what came out, what waits."""
    model = DistributedDataParallel(Branches(24), find_unused_parameters=True)
    registration = commhub.register(model, "batched_powersgd", start_step=0)
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    own, total = torch.zeros(24, 24, dtype=torch.float64), torch.zeros(24, 24, dtype=torch.float64)
    weight = model.module.unused.weight
    waiting = []
    for step in range(steps):
        model.zero_grad()
        x = torch.randn(4, 24, generator=torch.Generator().manual_seed(10 * step + rank))
        both = step % 2 == 0 or rank in both_on
        y = model(x, both=both)
        (mine,) = torch.autograd.grad(y.square().mean(), [weight], retain_graph=True) if both else (None,)
        y.square().mean().backward()
        assert_equal_across_ranks({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
        own += 0 if mine is None else mine.double()
        total += 0 if weight.grad is None else weight.grad.double()
        [local] = registration.state_dict()["local"].values()
        waiting.append(local["unused.weight"]["residual"])
    gathered = torch.stack([own, waiting[-1].double()])
    torch.distributed.all_reduce(gathered)
    given, left = gathered / world
    return waiting, float((total + left - given).norm() / given.norm())


@pytest.mark.parametrize("nproc", [2, 4])
@pytest.mark.parametrize("both_on", [(), (0,)])
def test_nothing_is_lost_of_a_parameter_that_some_ranks_did_not_use(ranks, nproc, both_on):
    """Its residual waits where no rank used it; else what a rank contributed to it all the same is kept."""
    for waiting, lost in ranks(unused, nproc, both_on, 6):
        assert lost < 1e-5
        assert waiting[0].count_nonzero() > 0
        assert torch.equal(waiting[0], waiting[1]) == (not both_on)


def half(path, cap, first):
    model = DistributedDataParallel(deep(), bucket_cap_mb=cap)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    registration = commhub.register(model, "batched_powersgd_rank2", start_step=2)
    file = f"{path}/{torch.distributed.get_rank()}.pt"
    parts = {"model": model.module, "optimizer": optimizer, "hook": registration}
    if first:
        train(model, 6, optimizer=optimizer)
        torch.save({name: part.state_dict() for name, part in parts.items()}, file)
    else:
        saved = torch.load(file, weights_only=True)
        for name, part in parts.items():
            part.load_state_dict(saved[name])
        assert registration.step == 6
    begun = tensors_of(registration)
    run = train(model, 6, first_step=6, optimizer=optimizer)
    shared = {k: t for k, t in tensors_of(registration).items() if k.startswith("shared")}
    assert_equal_across_ranks({**run.parameters, **shared})
    return begun, {**run.parameters, **tensors_of(registration)}, run.losses


def test_training_resumes_in_new_processes_bit_for_bit_with_the_same_buckets(ranks, tmp_path):
    """One bucket, whose parameters arrive in another order after DDP has rebuilt it."""
    straight = ranks(half, 2, str(tmp_path), 25, True)
    resumed = ranks.fresh(half, 2, str(tmp_path), 25, False)
    for again, (began, ended, _) in zip(resumed, straight, strict=True):
        for mine, theirs in zip(again.value, (began, ended), strict=False):
            assert mine.keys() == theirs.keys()
            for name, tensor in mine.items():
                assert bitwise_equal(tensor, theirs[name]), name


def test_with_other_buckets_state_is_loaded_as_it_was_and_the_factors_start_afresh(ranks, tmp_path):
    straight = ranks(half, 2, str(tmp_path), 2 * KB, True)
    resumed = ranks.fresh(half, 2, str(tmp_path), 25, False)
    for again, (began, ended, _) in zip(resumed, straight, strict=True):
        state, end, losses = again.value
        assert state.keys() == began.keys()
        assert all(bitwise_equal(state[name], tensor) for name, tensor in began.items())
        assert any(not bitwise_equal(end[name], tensor) for name, tensor in ended.items())
        groupings = {int(t) for name, t in end.items() if name.endswith("grouping")}
        assert len(groupings) == 1  # one bucket now
        assert len({int(t) for name, t in began.items() if name.endswith("grouping")}) == 12
        assert torch.tensor(losses).isfinite().all()
