"""Around the user's step(): what runs early, what an early update cannot know of, and that nothing stays behind."""

import copy
import gc
import itertools
import threading
import weakref

import pytest
import torch
import torch.distributed as dist
from commhub_optimizer_overlap import OptimizerOverlap
from torch import nn
from torch.distributed.algorithms.join import Join
from torch.nn.parallel import DistributedDataParallel

import commhub
from commhub import HookError, HookOptionError, RegistrationError
from commhub.testing import assert_equal_across_ranks, batches, bitwise_equal, mlp, train

MANY = 1e-6


def registered(hook="optimizer_overlap", make=None, module=None, **given):
    model = DistributedDataParallel(mlp() if module is None else module, bucket_cap_mb=MANY)
    optimizer = (make or (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)))(model.parameters())
    return model, optimizer, commhub.register(model, hook, optimizer=optimizer, timeout=20, **given)


def backward(model, step=0, scale=1.0):
    model.zero_grad()
    (model(*batches(8)(dist.get_rank(), step)).square().mean() * scale).backward()


def values(model):
    return [p.detach().clone() for p in model.parameters()]


def differ(a, b):
    return not any(map(torch.equal, a, b))


# What runs early.


class Gate(torch.autograd.Function):
    """Backward waits here until the event is set."""

    @staticmethod
    def forward(ctx, x, event, waited):
        ctx.event, ctx.waited = event, waited
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        ctx.waited.append(ctx.event.wait(20))
        return gradient, None, None


class Telling(torch.optim.SGD):
    """Sets an event when its last parameters are stepped."""

    event = None

    def step(self, closure=None):
        super().step(closure)
        if any(p.grad is not None for p in self.param_groups[0]["params"][-2:]):
            self.event.set()


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.net, self.event, self.waited = mlp((8, 8, 8)), threading.Event(), []

    def forward(self, x, gated):
        y = self.net[1](self.net[0](x))
        return self.net[2](Gate.apply(y, self.event, self.waited) if gated else y)


def in_the_midst_of_backward():
    module = Gated()
    model, optimizer, _ = registered(make=lambda p: Telling(p, lr=0.1), module=module)
    optimizer.event = module.event
    for step in range(3):
        module.event.clear()
        model.zero_grad()
        before = values(model)
        model(*batches(8)(dist.get_rank(), step), step > 1).square().mean().backward()
        assert differ(values(model), before) == (step > 0), "all is done early, but in the first step nothing is"
        after = values(model)
        optimizer.step()
        assert differ(values(model), after) == (step == 0), "step() does what is left"
    return module.waited


def test_a_bucket_is_stepped_while_backward_goes_on_from_the_second_step_on(ranks):
    assert ranks(in_the_midst_of_backward, 2) == [[True]] * 2


# What an early update cannot know of.


def refused_when(spoil, *, at, text, make=None):
    """`spoil` before step() number `at`; nothing is harmed in the first, and training goes on without the hook."""
    model, optimizer, registration = registered(make=make)
    for step in range(at):
        backward(model, step)
        optimizer.step()
    backward(model, at)
    before = values(model)
    with pytest.raises(RegistrationError, match=text):  # noqa: PT012 - a scaler's own step() raises too
        spoil(model, optimizer)
        optimizer.step()
    assert not differ(values(model), before)
    registration.remove()
    backward(model, 9)
    optimizer.step()
    assert differ(values(model), before)
    assert_equal_across_ranks(values(model))


def clip(model, _optimizer):
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)


def divide(model, _optimizer):
    next(model.parameters()).grad.div_(2)


def replace(model, _optimizer):
    first = next(model.parameters())
    first.grad = first.grad * 2


def set_rate(_model, optimizer):
    optimizer.param_groups[0]["lr"] = 0.5


def scaled(_model, optimizer):
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.ones(()))
    scaler.step(optimizer)


def unscaled(_model, optimizer):
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.ones(()))
    scaler.unscale_(optimizer)
    scaler.step(optimizer)


class Counting(torch.optim.SGD):
    """Its own count of steps makes the rate smaller."""

    count = 0

    def step(self, closure=None):
        self.count += 1
        super().step(closure)


class CountingInGroups(torch.optim.SGD):
    def step(self, closure=None):
        super().step(closure)
        self.param_groups[0]["k"] = self.param_groups[0].get("k", 0) + 1


def every_refusal():
    for at in (0, 2):
        refused_when(clip, at=at, text="gradients were changed.*Clipping by global norm.*cannot overlap")
        refused_when(divide, at=at, text="gradients were changed between backward and SGD.step")
        refused_when(replace, at=at, text="gradients were changed between backward and SGD.step")
        refused_when(scaled, at=at, text=r"a loss scaler.*scaler=scaler")
        refused_when(unscaled, at=at, text=r"a loss scaler.*scaler=scaler")
    refused_when(scaled, at=2, text="a loss scaler", make=lambda p: torch.optim.Adam(p, fused=True))
    refused_when(set_rate, at=2, text="'lr' of group 0 of SGD was changed between backward and step")
    for kind, what in ((Counting, "attribute 'count'"), (CountingInGroups, "'k' of group 0")):
        model, optimizer, _ = registered(make=lambda p, kind=kind: kind(p, lr=0.1))
        backward(model)
        with pytest.raises(RegistrationError, match=f"keeps .*{what}.* cannot run bucket by bucket"):
            optimizer.step()


def test_what_an_early_update_cannot_know_of_is_an_error(ranks):
    ranks(every_refusal, 2)


def without_its_step():
    model, optimizer, registration = registered()
    backward(model, 0)
    backward(model, 1)  # the first step was left out: nothing was updated early, so nothing is wrong
    with pytest.raises(HookError, match=r"SGD.step\(\) was not called.*no_sync"):
        backward(model, 2)
    registration.swap("optimizer_overlap")
    for step in range(3):
        backward(model, step)
        optimizer.step()
    assert_equal_across_ranks(values(model))


def test_a_step_left_out_is_an_error_in_the_next_backward(ranks):
    ranks(without_its_step, 2)


class Stumbling(nn.Module):
    """Its backward fails when told to, once the last layer is stepped."""

    def __init__(self):
        super().__init__()
        self.net, self.fails, self.event = mlp((8, 8, 8)), False, threading.Event()

    def forward(self, x):
        y = self.net[0](x)
        y.register_hook(self.stumble)
        return self.net[2](y)

    def stumble(self, _gradient):
        if self.fails:
            assert self.event.wait(20)
            raise ArithmeticError("planned")


def failed_midway(module):
    model, optimizer, _ = registered(make=lambda p: Telling(p, lr=0.1), module=module)
    optimizer.event = module.event
    for step in range(2):
        backward(model, step)
        optimizer.step()
    module.fails = True
    module.event.clear()
    with pytest.raises(ArithmeticError, match="planned"):
        backward(model, 2)
    return optimizer


def after_a_failed_backward():
    module = Stumbling()
    optimizer = failed_midway(module)
    gc.collect()
    module.fails = False
    again = DistributedDataParallel(module, bucket_cap_mb=MANY)  # PyTorch's own way out
    commhub.register(again, "optimizer_overlap", optimizer=optimizer, timeout=20)
    for step in range(3, 6):
        before = values(again)
        backward(again, step)
        optimizer.step()
        assert differ(values(again), before)
        assert_equal_across_ranks(values(again))


def test_after_a_backward_that_failed_midway_every_parameter_is_stepped_again(ranks):
    ranks(after_a_failed_backward, 2)


class Failing:
    """Fails in the third bucket of the third step, when the first is stepped."""

    def __init__(self, event):
        self.event = event

    def reduce(self, bucket):
        bucket.flat.copy_((yield commhub.AllReduce(bucket.flat)))
        if (bucket.step, bucket.index) == (2, 2):
            assert self.event.is_set()
            raise ArithmeticError("planned")


def after_a_failed_step():
    event = threading.Event()
    model, optimizer, registration = registered(OptimizerOverlap(inner=Failing(event)), lambda p: Telling(p, lr=0.1))
    optimizer.event = event
    for step in range(2):
        backward(model, step)
        optimizer.step()
    event.clear()
    with pytest.raises(HookError, match="ArithmeticError: planned"):
        backward(model, 2)
    registration.swap("optimizer_overlap")
    for step in range(3, 6):
        before = values(model)
        backward(model, step)
        optimizer.step()
        assert differ(values(model), before), "what was stepped before the failure is not stepped again"
    assert_equal_across_ranks(values(model))


def test_after_a_failed_step_every_parameter_is_stepped_again(ranks):
    ranks(after_a_failed_step, 2)


def shared():
    """One optimizer over two models, with a backward for each before its step; and each in turn."""
    found = []
    for hook in ("allreduce", "optimizer_overlap"):
        models = [DistributedDataParallel(mlp(seed=seed), bucket_cap_mb=MANY) for seed in (0, 1)]
        optimizer = torch.optim.SGD([*models[0].parameters(), *models[1].parameters()], lr=0.1, momentum=0.9)
        for model in models:
            commhub.register(model, hook, optimizer=optimizer, timeout=20)
        for step in range(4):
            for model in models if step % 2 else models[:1]:
                backward(model, step)
            optimizer.step()
            optimizer.zero_grad()
        found.append([value for model in models for value in values(model)])
    assert all(map(bitwise_equal, *found))


def test_an_optimizer_of_two_models(ranks):
    ranks(shared, 2)


# Loss scalers.


def with_a_scaler():
    pairs = []
    for hooked in (False, True):
        model = DistributedDataParallel(mlp(), bucket_cap_mb=MANY)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**14, growth_interval=2)
        if hooked:
            commhub.register(model, "optimizer_overlap", optimizer=optimizer, scaler=scaler, timeout=20)
        pairs.append((model, optimizer, scaler))
    for step in range(6):
        for model, optimizer, scaler in pairs:
            optimizer.zero_grad()
            loss = model(*batches(8)(dist.get_rank(), step)).square().mean()
            before = values(model)
            scaler.scale(loss * (float("inf") if step == 3 else 1.0)).backward()
            assert all(map(bitwise_equal, values(model), before)), "nothing is updated early"
            scaler.unscale_(optimizer)
            clip(model, optimizer)
            scaler.step(optimizer)
            scaler.update()
            assert differ(values(model), before) == (step != 3)
    assert all(map(bitwise_equal, values(pairs[0][0]), values(pairs[1][0])))
    assert pairs[0][2].get_scale() == pairs[1][2].get_scale()
    off = torch.amp.GradScaler("cpu", enabled=False)  # as good as none
    model, optimizer, _ = registered(scaler=off)
    for step in range(3):
        before = values(model)
        backward(model, step)
        assert differ(values(model), before) == (step > 0)
        off.step(optimizer)
        off.update()


def test_with_a_loss_scaler_step_does_all_and_may_be_skipped(ranks):
    ranks(with_a_scaler, 2)


# Refused at registration.


class Wrapping(torch.optim.Optimizer):
    """Has another optimizer do the work."""

    def __init__(self, inner):
        super().__init__(inner.param_groups, {})
        self.inner = inner


def at_registration():
    model = DistributedDataParallel(mlp())
    mine, other = torch.optim.SGD(model.parameters(), lr=0.1), torch.optim.SGD(mlp().parameters(), lr=0.1)
    for given, error, text in (
        ({}, RegistrationError, "needs optimizer="),
        ({"optimizer": torch.optim.LBFGS(model.parameters())}, RegistrationError, "LBFGS updates all parameters"),
        ({"optimizer": other}, RegistrationError, "the SGD that was given updates no parameter of this model"),
        ({"optimizer": [mine, torch.optim.Adam(model.parameters())]}, RegistrationError, "in two of the optimizers"),
        ({"optimizer": Wrapping(mine)}, RegistrationError, "the Wrapping that was given wraps a SGD. Give that one"),
        ({"optimizer": mine, "max_norm": 1.0}, HookOptionError, "max_norm"),
        ({"optimizer": mine, "inner": "optimizer_overlap"}, HookOptionError, "steps the optimizer itself"),
        ({"optimizer": mine, "inner": "periodic"}, HookOptionError, "averages parameters"),
    ):
        with pytest.raises(error, match=text):
            commhub.register(model, "optimizer_overlap", **given)
        assert left_on(mine) == (0, None)
    with pytest.raises(RegistrationError, match=r"updates no parameter|rank 1"):  # on one rank only
        commhub.register(model, "optimizer_overlap", optimizer=other if dist.get_rank() else mine)
    assert left_on(mine) == (0, None)
    with pytest.raises(RegistrationError, match="no optimizer was given"):
        commhub.register(model, OptimizerOverlap())
    zero = torch.distributed.optim.ZeroRedundancyOptimizer(model.parameters(), torch.optim.SGD, lr=0.1)
    with pytest.raises(RegistrationError, match="zero_overlap"):
        commhub.register(model, "optimizer_overlap", optimizer=zero)
    assert commhub.registration(model) is None


def test_what_cannot_overlap_is_refused_at_registration(ranks):
    ranks(at_registration, 2)


# Nothing stays behind.


def left_on(optimizer):
    hooks = (optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks)
    return sum(map(len, hooks)), vars(optimizer).get("_step_supports_amp_scaling")


def taken_away():
    for make, supports in ((None, None), (lambda p: torch.optim.Adam(p, fused=True), True)):
        model, optimizer, registration = registered(make=make)
        seen = []
        for step in range(3):
            backward(model, step)
            optimizer.step()
        registration.swap("optimizer_overlap(inner=fp16)")
        assert left_on(optimizer) == (2, True)
        backward(model, 3)
        optimizer.step()
        backward(model, 4)
        registration.swap("allreduce")  # before the step that is due, which still must not be done twice
        optimizer.register_step_post_hook(lambda *_, seen=seen: seen.append("post"))
        before = values(model)
        optimizer.step()
        assert all(map(bitwise_equal, values(model), before))
        assert left_on(optimizer) == (1, supports)
        assert seen == ["post"]
        backward(model, 5)
        optimizer.step()
        assert differ(values(model), before)
        registration.remove()
        assert left_on(optimizer) == (1, supports)


def test_what_the_hook_put_on_an_optimizer_goes_with_it(ranks):
    ranks(taken_away, 2)


def freed():
    model, optimizer, registration = registered()
    for step in range(2):
        backward(model, step)
        optimizer.step()
    gone, hook = weakref.ref(model), weakref.ref(registration.hook)
    del model, registration
    gc.collect()
    assert gone() is None
    assert hook() is None
    return left_on(optimizer)


def test_an_optimizer_keeps_neither_the_model_nor_the_hook_alive(ranks):
    assert ranks(freed, 2) == [(0, None)] * 2


# Elsewhere.


def joined():
    """Rank 1 has more batches than rank 0: both hold the same parameters in the end, as plain DDP's."""
    found = []
    for hook in ("optimizer_overlap", None):
        model = DistributedDataParallel(mlp(), bucket_cap_mb=MANY)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        if hook:
            commhub.register(model, hook, optimizer=optimizer, timeout=20)
        with Join([model]):
            for step in range(3 + 3 * dist.get_rank()):
                backward(model, step)
                optimizer.step()
        assert_equal_across_ranks(values(model))
        found.append(values(model))
        train(model, 2, optimizer=optimizer)  # and training goes on
    assert all(map(bitwise_equal, *found))


def test_uneven_inputs_end_in_the_same_parameters(ranks):
    ranks(joined, 2)


def by_hand():
    """`manual` without DDP is the same: average() updates, step() does what is left."""
    modules = [mlp(), mlp()]
    optimizers = [torch.optim.Adam(m.parameters(), lr=0.05) for m in modules]
    hooks = ({"hook": "allreduce"}, {"hook": "optimizer_overlap", "optimizer": optimizers[1]})
    registrations = [commhub.manual(m, **hook, timeout=20) for m, hook in zip(modules, hooks, strict=True)]
    for step, (module, optimizer, registration) in itertools.product(
        range(4), zip(modules, optimizers, registrations, strict=True)
    ):
        backward(module, step)
        before = values(module)
        registration.average()
        if module is modules[1]:
            assert differ(values(module), before) == (step > 0)
        optimizer.step()
    assert all(map(bitwise_equal, values(modules[0]), values(modules[1])))


def test_gradients_that_are_averaged_by_hand(ranks):
    ranks(by_hand, 2)


def resumed():
    """State of optimizer, model and hook, saved and loaded midway, change nothing."""
    model, optimizer, registration = registered(make=lambda p: torch.optim.Adam(p, lr=0.05))
    straight = []
    for step in range(6):
        if step == 3:
            saved = copy.deepcopy([model.module.state_dict(), optimizer.state_dict(), registration.state_dict()])
        backward(model, step)
        optimizer.step()
    straight = values(model)
    model, optimizer, registration = registered(make=lambda p: torch.optim.Adam(p, lr=0.9))
    model.module.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    registration.load_state_dict(saved[2])
    for step in range(3, 6):
        backward(model, step)
        optimizer.step()
    assert all(map(bitwise_equal, values(model), straight))
    assert registration.step == 6


def test_training_goes_on_from_a_checkpoint(ranks):
    ranks(resumed, 2)
