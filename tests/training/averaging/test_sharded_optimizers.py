"""Local steps with an optimizer that steps some parameters only on each rank, or another model's, are refused."""

import gc
import sys
import time

import pytest
import torch
import torch.distributed as dist
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

import commhub
from commhub import RegistrationError
from commhub.testing import batches, mlp

LOCAL = [
    "periodic(period=2)",
    "hierarchical(periods={2: 2})",
    "post_local_sgd(start_step=2, local_gradients=false)",
    "post_local_sgd(start_step=2)",
]


class Halves(torch.optim.Optimizer):
    """Another sharded one: rank r steps every p-th parameter, from the r-th on, and sends them."""

    def __init__(self, parameters):
        parameters = list(parameters)
        super().__init__(parameters, {})
        self.parameters = parameters
        self.optim = torch.optim.SGD(parameters[dist.get_rank() :: dist.get_world_size()], lr=0.1)

    def step(self, closure=None):
        self.optim.step()
        for number, parameter in enumerate(self.parameters):
            dist.broadcast(parameter.data, number % dist.get_world_size())


class Around(torch.optim.Optimizer):
    """One that wraps another and steps all of its parameters."""

    def __init__(self, inside):
        super().__init__(inside.param_groups, {})
        self.param_groups = inside.param_groups
        self.optim = inside

    def step(self, closure=None):
        self.optim.step()


class ByShape(torch.optim.Optimizer):
    """Two others, one for matrices and one for the rest: each has some parameters, but together they are all."""

    def __init__(self, parameters):
        parameters = list(parameters)
        super().__init__(parameters, {})
        self.matrices = torch.optim.SGD([p for p in parameters if p.ndim == 2], lr=0.1)
        self.rest = torch.optim.Adam([p for p in parameters if p.ndim != 2], lr=0.1)

    def step(self, closure=None):
        self.matrices.step()
        self.rest.step()


def zero(parameters):
    return ZeroRedundancyOptimizer(parameters, torch.optim.SGD, lr=0.1)


SHARDED = {"zero": zero, "another": Halves, "wrapped": lambda parameters: Around(zero(parameters))}


def step(model, optimizer, number):
    optimizer.zero_grad()
    model(*batches(8)(dist.get_rank(), number)).square().mean().backward()
    optimizer.step()


def given(hooks):
    for kind, make in SHARDED.items():
        for hook in hooks:
            model = DistributedDataParallel(mlp())
            sharded = make(model.parameters())
            for several in (sharded, [torch.optim.SGD(model.parameters(), lr=0.1), sharded]):
                with pytest.raises(RegistrationError, match=r"steps on each rank only the parameters.*local steps"):
                    commhub.register(model, hook, optimizer=several, timeout=20)
            assert commhub.registration(model) is None, kind
            step(model, sharded, 0)
            if hook == hooks[0]:
                with pytest.raises(RegistrationError, match="only the parameters"):
                    commhub.manual(mlp(), hook, optimizer=sharded, timeout=20)


def test_a_sharded_optimizer_is_refused_where_it_is_given(ranks):
    ranks(given, 2, LOCAL)


def not_given(kind):
    model = DistributedDataParallel(mlp())
    sharded = SHARDED[kind](model.parameters())
    registration = commhub.register(model, "periodic(period=2)", timeout=20)
    before = [p.detach().clone() for p in model.parameters()]
    model(*batches(8)(dist.get_rank(), 0)).square().mean().backward()
    started = time.monotonic()
    for _ in range(2):
        with pytest.raises(RegistrationError, match="only the parameters"):
            sharded.step()
    assert time.monotonic() - started < 5
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    elsewhere = mlp()
    other = SHARDED[kind](elsewhere.parameters())  # whose model has no local steps
    elsewhere(*batches(8)(dist.get_rank(), 0)).square().mean().backward()
    other.step()
    plain = torch.optim.SGD(model.parameters(), lr=0.1)
    for number in range(3):
        step(model, plain, number)
    registration.swap("allreduce")
    step(model, sharded, 3)
    registration.swap("periodic")
    with pytest.raises(RegistrationError, match="only the parameters"):
        step(model, sharded, 4)
    registration.remove()
    step(model, sharded, 5)


@pytest.mark.parametrize("kind", SHARDED)
def test_one_that_nobody_spoke_of_is_refused_when_it_steps(ranks, kind):
    ranks(not_given, 2, kind)


def nothing_stays():
    hooks = sys.modules["torch.optim.optimizer"]._global_optimizer_pre_hooks
    before = len(hooks)
    model = DistributedDataParallel(mlp())
    registration = commhub.register(model, "periodic")
    assert len(hooks) == before + 1
    registration.swap("allreduce")
    assert len(hooks) == before
    with pytest.raises(commhub.CommhubError):
        commhub.register(model, "periodic", optimizer=zero(model.parameters()), timeout=20)
    assert len(hooks) == before
    registration = commhub.register(model, "periodic")
    registration.close()
    assert len(hooks) == before
    module = mlp()
    manual = commhub.manual(module, "periodic")
    del manual, module  # nobody ended it
    gc.collect()
    registration = commhub.register(model, "periodic")
    registration.remove()
    assert len(hooks) == before


def test_nothing_stays_on_other_optimizers_when_the_registration_has_ended(ranks):
    ranks(nothing_stays, 2)


def welcome():
    for make in (lambda p: Around(torch.optim.SGD(p, lr=0.1)), ByShape):
        model = DistributedDataParallel(mlp())
        optimizer = make(list(model.parameters()))
        commhub.register(model, "periodic(period=2)", optimizer=optimizer, timeout=20)
        for number in range(3):
            step(model, optimizer, number)
        other = model.module[0].weight.detach().clone()
        dist.broadcast(other, 0)
        assert torch.equal(other, model.module[0].weight)
    for hook in ("allreduce", "zero_overlap"):
        model = DistributedDataParallel(mlp())
        optimizer = zero(model.parameters())
        commhub.register(model, hook, optimizer=optimizer, timeout=20)
        step(model, optimizer, 0)


def test_wrappers_that_step_everything_and_sharded_ones_without_local_steps_are_welcome(ranks):
    ranks(welcome, 2)


def one_rank():
    model = DistributedDataParallel(mlp())
    optimizer = zero(model.parameters())
    commhub.register(model, "periodic(period=2)", optimizer=optimizer, timeout=20)
    step(model, optimizer, 0)


def test_alone_a_rank_owns_everything(ranks):
    ranks(one_rank, 1)


def strangers():
    model = DistributedDataParallel(mlp())
    mine, others = torch.optim.SGD(model.parameters(), lr=0.1), torch.optim.Adam(mlp().parameters())
    for hook in LOCAL:
        for several in (others, [mine, others]):
            with pytest.raises(RegistrationError, match="Adam that was given updates no parameter of this model"):
                commhub.register(model, hook, optimizer=several, timeout=20)
            with pytest.raises(RegistrationError, match="updates no parameter"):
                commhub.register(model, hook, optimizer=mine if dist.get_rank() else several, timeout=20)
    with pytest.raises(RegistrationError, match="updates no parameter"):
        commhub.manual(mlp(), "periodic", optimizer=others, timeout=20)
    commhub.register(model, "periodic", optimizer=mine, timeout=20)


def test_another_models_optimizer_is_refused(ranks):
    ranks(strangers, 2)
