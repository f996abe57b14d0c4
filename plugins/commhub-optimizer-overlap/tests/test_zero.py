"""zero_overlap against plain DDP with ZeroRedundancyOptimizer, on Gloo: parameters and sharded state, bit by bit."""

import itertools
import os

import pytest
import torch
import torch.distributed as dist
from commhub_optimizer_overlap import ZeroOverlap
from torch import nn
from torch.distributed.algorithms.join import Join
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

import commhub
from commhub import RegistrationError
from commhub.testing import assert_equal_across_ranks, batches, bitwise_equal, mlp

ONE, MANY = 25.0, 1e-6  # bucket_cap_mb
TWENTY_STEPS = [("zero_overlap", 3), ("zero_overlap(mode=stepwise)", 2)]
if os.environ.get("COMMHUB_EVERY_CHECK"):
    TWENTY_STEPS = list(itertools.product(("zero_overlap", "zero_overlap(mode=stepwise)"), (2, 3, 4)))


def adam(parameters, **options):
    return ZeroRedundancyOptimizer(parameters, torch.optim.Adam, lr=0.02, **options)


def momentum(parameters, **options):
    return ZeroRedundancyOptimizer(parameters, torch.optim.SGD, lr=0.1, momentum=0.9, **options)


class Sides(nn.Module):
    """Five layers, and one more that is used when asked for."""

    def __init__(self):
        super().__init__()
        self.net, self.side = mlp((8, 8, 8, 8)), mlp((8, 8), seed=1)

    def forward(self, x, with_side=True):
        y = self.net(x)
        return (y + self.side(x) if with_side else y).square().mean()


def pair(make, cap=MANY, hook="zero_overlap", grouped=False, **mode):
    models = [DistributedDataParallel(Sides(), bucket_cap_mb=cap, **mode) for _ in range(2)]
    optimizers = []
    for model in models:
        weights = [p for p in model.parameters() if p.dim() > 1]
        others = [p for p in model.parameters() if p.dim() <= 1]
        groups = [{"params": weights}, {"params": others, "lr": 0.005}]
        optimizers.append(make(groups) if grouped else make(model.parameters()))
    return models, optimizers, commhub.register(models[1], hook, optimizer=optimizers[1], timeout=30)


def values(model):
    return [p.detach().clone() for p in model.parameters()]


def equal(a, b):
    return all(map(bitwise_equal, a, b))


def step_both(models, optimizers, step, with_side=True, set_to_none=True):
    """One step of each; whether the hooked model's parameters all changed in backward."""
    (x,) = batches(8)(dist.get_rank(), step)
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=set_to_none)
    before = values(models[1])
    sum(model(x, with_side) for model in models).backward()
    early = not any(map(torch.equal, values(models[1]), before))
    for optimizer in optimizers:
        optimizer.step()
    return early


def against_plain(hook):
    for make in (adam, momentum):
        for cap in (MANY, ONE):
            models, optimizers, registration = pair(make, cap, hook, grouped=True)
            schedulers = [torch.optim.lr_scheduler.LambdaLR(o, lambda n: 0.5 ** (1 + n // 4)) for o in optimizers]
            sent = []
            for step in range(20):
                early = step_both(models, optimizers, step)
                assert early == (step > 0), (hook, make, step)
                assert equal(values(models[0]), values(models[1])), (hook, make, cap, step)
                sent.append(registration.stats.last.sent_bytes)
                for scheduler in schedulers:
                    scheduler.step()
            p, size = dist.get_world_size(), sum(q.nbytes for q in models[0].parameters())
            assert sent[-1] == pytest.approx(3 * (p - 1) / p * size, abs=16), "nothing is sent twice"
            for optimizer in optimizers:
                optimizer.consolidate_state_dict(0)
            if dist.get_rank() == 0:
                plain, hooked = (optimizer.state_dict() for optimizer in optimizers)
                assert len(plain["state"]) == len(list(models[0].parameters()))
                for key, table in plain["state"].items():
                    assert all(bitwise_equal(table[name], hooked["state"][key][name]) for name in table)
                assert str(plain["param_groups"]) == str(hooked["param_groups"])


@pytest.mark.parametrize(("hook", "nproc"), TWENTY_STEPS)
def test_twenty_steps_with_groups_schedulers_and_consolidated_state(ranks, hook, nproc):
    ranks(against_plain, nproc, hook)


def in_modes(hook):
    rank = dist.get_rank()
    for mode, options in (
        ({"find_unused_parameters": True}, {}),
        ({"static_graph": True}, {}),
        ({"gradient_as_bucket_view": True}, {"parameters_as_bucket_view": True}),
    ):
        models, optimizers, _ = pair(lambda p, options=options: momentum(p, **options), MANY, hook, **mode)
        for step in range(8):
            with_side = (False, rank == 1, True, False)[step % 4] if "find_unused_parameters" in mode else True
            step_both(models, optimizers, step, with_side, set_to_none=step % 8 < 4)
            assert equal(values(models[0]), values(models[1])), (hook, mode, step)
    models, optimizers, _ = pair(adam, MANY, f"{hook.rstrip(')')}{', ' if '(' in hook else '('}inner=powersgd(rank=1))")
    commhub.register(models[0], "powersgd(rank=1)", timeout=30)
    for step in range(4):
        step_both(models, optimizers, step)
        assert equal(values(models[0]), values(models[1])), (hook, "powersgd", step)


@pytest.mark.parametrize("hook", ["zero_overlap", "zero_overlap(mode=stepwise)"])
def test_modes_of_ddp_unused_parameters_views_and_inner_hooks(ranks, hook):
    ranks(in_modes, 2, hook)


class Staged:
    """The plain average, but the first bucket takes ten messages more than the others."""

    def reduce(self, bucket):
        for _ in range(10 if bucket.index == 0 else 0):
            yield commhub.AllReduce(bucket.flat.clone())
        bucket.flat.copy_((yield commhub.AllReduce(bucket.flat)))


def in_stages():
    models, optimizers, _ = pair(adam, MANY, ZeroOverlap(inner=Staged(), mode="stepwise"))
    for step in range(4):
        assert step_both(models, optimizers, step) == (step > 0), "the first bucket is not waited for"
        assert equal(values(models[0]), values(models[1])), step


def test_stepwise_waits_for_every_bucket_whatever_order_they_end_in(ranks):
    ranks(in_stages, 2)


class Odd(nn.Module):
    """Weights that are not contiguous, which plain ZeroRedundancyOptimizer cannot send on Gloo."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(2)
        self.a = nn.Parameter(torch.randn(6, 8, generator=generator).t())
        kernel = torch.randn(4, 2, 2, 2, generator=generator).to(memory_format=torch.channels_last)
        self.b = nn.Parameter(kernel)

    def forward(self, x, _with_side):
        y = torch.tanh(x @ self.a)[:, :4].repeat(1, 2).reshape(-1, 2, 2, 2)
        return nn.functional.conv2d(y, self.b).square().mean()


def with_odd_strides(wire):
    models = [DistributedDataParallel(Odd(), bucket_cap_mb=MANY) for _ in range(2)]
    plain = torch.optim.Adam(models[0].parameters(), lr=0.02)  # what ZeRO's result is by definition
    zero = adam(models[1].parameters())
    commhub.register(models[0], "allreduce", wire=wire, timeout=30)
    commhub.register(models[1], "zero_overlap", optimizer=zero, wire=wire, timeout=30)
    for step in range(6):
        step_both(models, [plain, zero], step)
        assert equal(values(models[0]), values(models[1])), (wire, step)


@pytest.mark.parametrize("wire", [None, "bf16"])
def test_any_strides_and_parameters_travel_whole_whatever_the_wire(ranks, wire):
    ranks(with_odd_strides, 2, wire)


def swapped_and_joined():
    models, optimizers, registration = pair(adam)
    for step in range(3):
        step_both(models, optimizers, step)
    registration.swap("zero_overlap(mode=stepwise)")
    for step in range(3, 6):
        step_both(models, optimizers, step)
    registration.swap("allreduce")
    assert "_sync_params" not in vars(optimizers[1])
    assert len(optimizers[1]._optimizer_step_pre_hooks) == 0
    for step in range(6, 8):
        step_both(models, optimizers, step)
        assert equal(values(models[0]), values(models[1])), step
    for hook in ("zero_overlap", "zero_overlap(mode=stepwise)"):
        model = DistributedDataParallel(Sides(), bucket_cap_mb=MANY)
        zero = momentum(model.parameters())
        commhub.register(model, hook, optimizer=zero, timeout=30)
        with Join([model, zero]):  # a rank that has run out of inputs still owns parameters
            for step in range(3 + 2 * dist.get_rank()):
                zero.zero_grad()
                model(*batches(8)(dist.get_rank(), step)).backward()
                zero.step()
                assert model.module.net[0].weight.isfinite().all()
        assert_equal_across_ranks(values(model))


def test_swapped_in_training_and_with_uneven_inputs(ranks):
    ranks(swapped_and_joined, 2)


def refused():
    model = DistributedDataParallel(mlp())
    half = dist.new_group([0]), dist.new_group([1])
    parameters = list(model.parameters())
    for optimizer, text in (
        (torch.optim.Adam(parameters), "takes one torch.distributed.optim.ZeroRedundancyOptimizer"),
        ([adam(parameters), adam(parameters)], "takes one torch.distributed.optim.ZeroRedundancyOptimizer"),
        (ZeroRedundancyOptimizer(parameters, torch.optim.LBFGS), "LBFGS updates all parameters"),
        (adam(parameters, process_group=half[dist.get_rank()]), "sharded over 1 ranks"),
        (adam(list(mlp().parameters())), "updates no parameter of this model"),
    ):
        with pytest.raises(RegistrationError, match=text):
            commhub.register(model, "zero_overlap", optimizer=optimizer)
    zero = adam(parameters)
    zero._overlap_with_ddp = True
    with pytest.raises(RegistrationError, match="overlap_with_ddp=True"):
        commhub.register(model, "zero_overlap", optimizer=zero)


def test_what_cannot_overlap_is_refused_at_registration(ranks):
    ranks(refused, 2)


def test_a_simulation_sends_what_training_would():
    gradients = [[torch.full((6, 4), rank + 1.0)] for rank in range(4)]
    plain, zero = (commhub.simulate(hook, gradients) for hook in ("optimizer_overlap", "zero_overlap"))
    assert plain.gradients[0][0].unique().tolist() == zero.gradients[0][0].unique().tolist() == [2.5]
    assert plain.sent_bytes[0] == pytest.approx(2 * 3 / 4 * 96)
    assert zero.sent_bytes[0] == pytest.approx(3 * 3 / 4 * 96)
