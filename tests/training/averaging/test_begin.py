"""An averager that remembers parameters is told which ones training begins with, wherever it is at work."""

import copy

import pytest
import torch
import torch.distributed as dist
from commhub_post_local_sgd import PostLocalSGDOptimizer
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import commhub
from commhub.testing import batches, mlp

LR = 0.1


class Anchored:
    """Goes back to half way between where training began and the mean, in every second step."""

    def __init__(self):
        self.told = []

    def prepare(self, setup):
        self.group = setup.partition([range(setup.world_size)])
        self.state = setup.state
        for name, shape, dtype in zip(setup.names, setup.shapes, setup.dtypes, strict=True):
            setup.state.shared(name)["anchor"] = torch.zeros(shape, dtype=dtype)

    def begin(self, parameters):
        assert not torch.is_grad_enabled()
        for name, value in parameters.items():
            self.state.shared(name)["anchor"].copy_(value)
        self.told.append(float(next(iter(parameters.values())).flatten()[0]))

    def due(self, step):
        return self.group if step % 2 else None

    def reduce(self, bucket):
        bucket.flat.copy_((yield commhub.AllReduce(bucket.flat)))
        for name, value in zip(bucket.names, bucket.gradients, strict=True):
            value.lerp_(self.state.shared(name)["anchor"], 0.5)


class InAHook:
    def __init__(self, averager):
        self.averager = averager

    def prepare(self, setup):
        setup.average(self.averager)

    def reduce(self, bucket):
        yield from ()


class ByHand:
    """The same for all ranks in float64."""

    def __init__(self, start):
        self.models = [mlp().double() for _ in range(dist.get_world_size())]
        self.anchor = {name: value.detach().double() for name, value in start.items()}
        for model in self.models:
            model.load_state_dict(self.anchor)

    def step(self, number):
        for rank, model in enumerate(self.models):
            model.zero_grad()
            model(batches(8)(rank, number)[0].double()).square().mean().backward()
        with torch.no_grad():
            for name, anchor in self.anchor.items():
                every = [model.get_parameter(name) for model in self.models]
                for p in every:
                    p.sub_(p.grad, alpha=LR)
                if number % 2:
                    mean = torch.stack([p.detach() for p in every]).mean(0)
                    for p in every:
                        p.copy_((mean + anchor) / 2)

    def assert_like(self, module, case):
        mine = self.models[dist.get_rank()]
        for name, p in module.named_parameters():
            expected = mine.get_parameter(name.removeprefix("module.")).detach()
            torch.testing.assert_close(p.detach().double(), expected, rtol=1e-5, atol=1e-6, msg=f"{case} {name}")


def weights(factor=3.0):
    return {name: factor * p.detach() for name, p in mlp(seed=4).state_dict().items()}


def local_step(model, optimizer, number):
    optimizer.zero_grad()
    model(*batches(8)(dist.get_rank(), number)).square().mean().backward()
    optimizer.step()


def begun(hook):
    """It is told once for the first step, and once for each step that comes after weights were loaded."""
    averager = Anchored()
    model = DistributedDataParallel(mlp())
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    registration = commhub.register(model, hook(averager), optimizer=optimizer, timeout=20)
    for part in (range(3), range(3, 6)):
        factor = 3.0 + part.start
        model.module.load_state_dict(weights(factor))
        by_hand = ByHand(weights(factor))
        for number in part:
            model(torch.ones(1, 8))
            local_step(model, optimizer, number)
            by_hand.step(number)
            by_hand.assert_like(model, number)
        assert averager.told.pop() == pytest.approx(float(weights(factor)["0.weight"].flatten()[0]))
        assert not averager.told
    registration.remove()
    local_step(model, optimizer, 6)
    model.module.load_state_dict(weights())
    local_step(model, optimizer, 7)
    assert not averager.told


def in_turn():
    for hook in (lambda averager: averager, InAHook):
        begun(hook)


def test_it_is_told_what_the_first_step_was_computed_with_and_what_was_loaded_since(ranks):
    ranks(in_turn, 2)


def accumulated():
    """The first step's parameters are those of its backward passes, not those after the optimizer's step."""
    averager = Anchored()
    model = DistributedDataParallel(mlp())
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    registration = commhub.register(model, averager, optimizer=optimizer, timeout=20)
    model.module.load_state_dict(weights())
    with model.no_sync():
        model(*batches(8)(dist.get_rank(), 0)).square().mean().backward()
    local_step(model, optimizer, 1)
    first = float(weights()["0.weight"].flatten()[0])
    assert averager.told == [first]
    assert registration.state_dict()["step"] == 1
    assert averager.told == [first]


def test_accumulated_backward_passes_begin_where_their_parameters_are(ranks):
    ranks(accumulated, 2)


def in_an_optimizer(averager):
    """It registers in its first step, before that moves anything. Weights that are loaded with its state count too,
    and what is added begins with the mean of all."""
    module = mlp()
    optimizer = PostLocalSGDOptimizer(torch.optim.SGD(module.parameters(), lr=LR), averager)
    state = copy.deepcopy(optimizer.state_dict())
    for start in (dict(module.state_dict()), weights()):
        module.load_state_dict(start)
        optimizer.load_state_dict(state)
        by_hand = ByHand(start)
        for number in range(4):
            local_step(module, optimizer, number)
            by_hand.step(number)
            by_hand.assert_like(module, number)
    local_step(module, optimizer, 4)
    late = nn.Parameter(torch.ones(2))
    optimizer.add_param_group({"params": [late]})
    by_hand = ByHand(dict(module.named_parameters()))
    for number in range(5, 8):
        local_step(module, optimizer, number)
        by_hand.step(number)
        by_hand.assert_like(module, number)


def test_an_optimizer_that_averages_begins_before_its_first_step(ranks):
    ranks(in_an_optimizer, 2, Anchored())


def by_name():
    """DiLoCo in the optimizer: all ranks go out from one place, and stay together."""
    module = mlp()
    optimizer = PostLocalSGDOptimizer(torch.optim.SGD(module.parameters(), lr=LR), "diloco(period=2)")
    for number in range(4):
        local_step(module, optimizer, number)
    total = torch.cat([p.detach().flatten() for p in module.parameters()])
    other = total.clone()
    dist.broadcast(other, 0)
    assert torch.equal(total, other)


def test_ranks_stay_together_in_an_optimizer_that_averages_with_diloco(ranks):
    ranks(by_name, 2)
