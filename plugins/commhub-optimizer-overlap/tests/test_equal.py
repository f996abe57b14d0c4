"""Parameters and optimizer state end as with plain DDP and optimizer.step(), bit by bit."""

import contextlib
import itertools
import os

import pytest
import torch
import torch.distributed as dist
from commhub_optimizer_overlap import OptimizerOverlap
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import lr_scheduler

import commhub
from commhub.testing import bitwise_equal

STEPS = 20
ONE, SOME, MANY = 25.0, 1e-4, 1e-6  # bucket_cap_mb: one bucket, four, one for each parameter


class Mixture(nn.Module):
    """A few hundred parameters: transposed, channels_last, a vector, a scalar; `side` is used when asked for."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(3)

        def drawn(*shape):
            return torch.empty(shape).normal_(0, 0.4, generator=generator)

        self.first = nn.Parameter(drawn(8, 8))
        self.conv = nn.Parameter(drawn(4, 2, 2, 2).to(memory_format=torch.channels_last))
        self.side = nn.Parameter(drawn(8, 6))
        self.transposed = nn.Parameter(drawn(6, 4).t())
        self.vector = nn.Parameter(drawn(6))
        self.scalar = nn.Parameter(drawn(1).reshape(()))

    def forward(self, x, with_side):
        y = torch.tanh(x @ self.first).reshape(-1, 2, 2, 2)
        y = nn.functional.conv2d(y, self.conv).flatten(1)
        y = torch.tanh(y @ self.transposed) * self.vector + self.scalar
        return (y + x @ self.side if with_side else y).square().mean()


def batch(step, extra=0):
    generator = torch.Generator().manual_seed(1000 * step + dist.get_rank() + 100 * extra)
    return torch.randn(4, 8, generator=generator)


def grouped(kind, lr=0.05, **options):
    """One optimizer with two groups."""

    def make(model):
        matrices = [p for p in model.parameters() if p.dim() > 1]
        others = [p for p in model.parameters() if p.dim() <= 1]
        return [kind([{"params": matrices}, {"params": others, "lr": lr / 4}], lr=lr, **options)]

    return make


def two(model):
    """Muon for matrices, AdamW for the rest."""
    matrices = [p for p in model.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if p.dim() != 2]
    return [torch.optim.Muon(matrices, lr=0.02), torch.optim.AdamW(others, lr=0.02)]


def named(model):
    return [torch.optim.Adam(model.named_parameters(), lr=torch.tensor(0.02))]


OPTIMIZERS = {
    "SGD": grouped(torch.optim.SGD, momentum=0.9, nesterov=True, weight_decay=0.01),
    "SGD, foreach": grouped(torch.optim.SGD, momentum=0.9, dampening=0.1, maximize=True, lr=1e-3, foreach=True),
    "SGD, fused": grouped(torch.optim.SGD, momentum=0.9, fused=True),
    "Adam": grouped(torch.optim.Adam, amsgrad=True),
    "Adam, foreach": grouped(torch.optim.Adam, foreach=True),
    "Adam, fused": grouped(torch.optim.Adam, fused=True),
    "Adam, named parameters, lr a tensor": named,
    "AdamW": grouped(torch.optim.AdamW, weight_decay=0.1),
    "Adamax": grouped(torch.optim.Adamax),
    "NAdam": grouped(torch.optim.NAdam),
    "RAdam": grouped(torch.optim.RAdam),
    "RMSprop": grouped(torch.optim.RMSprop, momentum=0.5, centered=True),
    "Rprop": grouped(torch.optim.Rprop),
    "ASGD": grouped(torch.optim.ASGD),
    "Adadelta": grouped(torch.optim.Adadelta, lr=1.0),
    "Adagrad": grouped(torch.optim.Adagrad, lr_decay=0.1),
    "Adafactor": grouped(torch.optim.Adafactor),
    "Muon and AdamW": two,
}
ELSEWHERE = {"LBFGS", "SparseAdam", "Optimizer"}  # refused; in a test of its own; the base


def test_every_optimizer_of_torch_is_in_the_table():
    kinds = {name for name in dir(torch.optim) if isinstance(getattr(torch.optim, name), type)}
    assert kinds - {part for key in OPTIMIZERS for part in key.replace(",", "").split()} == ELSEWHERE


class Pair:
    """The same model and optimizers twice: plain, and with the hook."""

    def __init__(self, optimizers, cap=MANY, hook="optimizer_overlap", **mode):
        self.models = [DistributedDataParallel(Mixture(), bucket_cap_mb=cap, **mode) for _ in range(2)]
        self.optimizers = [optimizers(model) for model in self.models]
        self.schedulers = [[self.schedule(optimizer) for optimizer in several] for several in self.optimizers]
        self.registration = commhub.register(self.models[1], hook, optimizer=self.optimizers[1], timeout=30)

    @staticmethod
    def schedule(optimizer):
        return lr_scheduler.StepLR(optimizer, step_size=3, gamma=0.7)

    def backward(self, *inputs, sync=True):
        with contextlib.ExitStack() as stack:
            for model in self.models:
                if not sync:
                    stack.enter_context(model.no_sync())
            self.loss(*inputs).backward()

    def loss(self, *inputs):
        return sum(model(*inputs) for model in self.models)

    def zero(self, *, set_to_none=True):
        for optimizer in itertools.chain(*self.optimizers):
            optimizer.zero_grad(set_to_none=set_to_none)

    def step(self, *inputs, set_to_none=True):
        self.zero(set_to_none=set_to_none)
        self.backward(*inputs)
        self.update()

    def update(self):
        for optimizer, scheduler in zip(
            itertools.chain(*self.optimizers), itertools.chain(*self.schedulers), strict=True
        ):
            optimizer.step()
            scheduler.step()

    def differences(self):
        """Names of parameters, gradients and entries of the optimizers' state that differ."""
        plain, hooked = (dict(model.module.named_parameters()) for model in self.models)
        found = [name for name in plain if not bitwise_equal(plain[name].detach(), hooked[name].detach())]
        for name, p in plain.items():
            if not same(p.grad, hooked[name].grad):
                found.append(f"{name}.grad")
        for number, (mine, theirs) in enumerate(zip(*self.optimizers, strict=True)):
            a, b = mine.state_dict(), theirs.state_dict()
            if not same(a, b):
                found.append(f"the state of optimizer {number}")
        return found


def same(a, b):
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.stride() == b.stride() and bitwise_equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def with_each(names, cap):
    for start in range(0, len(names), 6):
        pairs = {name: Pair(OPTIMIZERS[name], cap) for name in names[start : start + 6]}
        for step in range(STEPS):
            before = {name: pair.models[1].module.first.detach().clone() for name, pair in pairs.items()}
            for pair in pairs.values():
                pair.zero()
            sum(pair.loss(batch(step), True) for pair in pairs.values()).backward()  # quicker than one by one
            for name, pair in pairs.items():
                pair.update()
                assert pair.differences() == [], f"{name}, step {step}"
                assert not bitwise_equal(pair.models[1].module.first.detach(), before[name]), f"{name} does nothing"
        buckets = pair.models[1]._get_ddp_logging_data()["rebuilt_bucket_sizes"].split(",")
        assert len(buckets) == {ONE: 1, SOME: 4, MANY: 6}[cap]


@pytest.mark.parametrize(("nproc", "cap"), [(2, SOME), (4, MANY), (2, ONE)])
def test_every_optimizer_with_groups_and_schedulers(ranks, nproc, cap):
    names = list(OPTIMIZERS) if cap == SOME else ["SGD", "Adam, fused", "Muon and AdamW"]
    ranks(with_each, nproc, names, cap)


def in_modes():
    """Unused here, unused everywhere, kept gradients, accumulated ones: parameters that are not used stay."""
    rank = dist.get_rank()
    for name in ("SGD", "Adam"):
        for mode in (
            {"find_unused_parameters": True},
            {"find_unused_parameters": True, "gradient_as_bucket_view": True},
            {"gradient_as_bucket_view": True},
            {"static_graph": True},
        ):
            pair = Pair(OPTIMIZERS[name], **mode)
            for step in range(12):
                if "find_unused_parameters" in mode:
                    with_side = (False, rank == 1, True, False)[step % 4]  # nobody's, one rank's, everyone's
                else:
                    with_side = "static_graph" not in mode
                before = pair.models[1].module.side.detach().clone()
                pair.step(batch(step), with_side, set_to_none=step % 8 < 4)
                assert pair.differences() == [], (name, mode, step)
                if "static_graph" in mode or ("find_unused_parameters" in mode and step % 8 in (0, 3)):
                    assert bitwise_equal(pair.models[1].module.side.detach(), before), (name, mode, step)


@pytest.mark.parametrize("nproc", [2, 4] if os.environ.get("COMMHUB_EVERY_CHECK") else [2])
def test_every_mode_of_ddp_and_parameters_that_no_rank_uses(ranks, nproc):
    ranks(in_modes, nproc)


def accumulated():
    for mode in ({}, {"gradient_as_bucket_view": True}, {"find_unused_parameters": True}):
        pair = Pair(OPTIMIZERS["Adam"], **mode)
        for step in range(6):
            pair.zero()
            before = pair.models[1].module.first.detach().clone()
            pair.backward(batch(step), True, sync=False)
            pair.backward(batch(step, 1), False, sync=False)
            assert bitwise_equal(pair.models[1].module.first.detach(), before)
            pair.backward(batch(step, 2), "find_unused_parameters" not in mode)
            pair.update()
            assert pair.differences() == [], (mode, step)
        pair.zero()
        pair.backward(batch(9), True, sync=False)  # never synchronised: step() does all of it
        pair.update()
        assert pair.differences() == [], mode


def test_accumulated_gradients_are_used_once_they_are_synchronised(ranks):
    ranks(accumulated, 2)


def by_closure():
    pair = Pair(OPTIMIZERS["SGD"])
    for step in range(5):
        losses = []
        for model, (optimizer,), (scheduler,) in zip(pair.models, pair.optimizers, pair.schedulers, strict=True):

            def closure(model=model, optimizer=optimizer, step=step):
                optimizer.zero_grad()
                loss = model(batch(step), True)
                loss.backward()
                return loss

            losses.append(optimizer.step(closure) if step % 2 else optimizer.step(closure=closure))
            scheduler.step()
        assert losses[0].item() == losses[1].item()
        assert pair.differences() == [], step


def test_a_closure_runs_backward_within_the_step(ranks):
    ranks(by_closure, 2)


class Cycling(Pair):
    @staticmethod
    def schedule(optimizer):
        return lr_scheduler.OneCycleLR(optimizer, max_lr=0.05, total_steps=STEPS + 1)


def with_cycles():
    pair = Cycling(OPTIMIZERS["Adam"])
    for step in range(STEPS):
        pair.step(batch(step), True)
    assert pair.differences() == []
    (optimizer,) = pair.optimizers[1]
    extra = [nn.Parameter(torch.ones(3)) for _ in range(2)]
    for parameter, (mine,) in zip(extra, pair.optimizers, strict=True):  # a group more, outside the model
        parameter.grad = torch.ones(3)
        mine.add_param_group({"params": [parameter], "lr": 0.1})
    saved = optimizer.state_dict()
    optimizer.load_state_dict(saved)
    for mine in itertools.chain(*pair.optimizers):
        mine.param_groups[0]["lr"] = 0.03
    pair.schedulers = [[_Nothing()], [_Nothing()]]
    for step in range(3):
        for model in pair.models:
            model.zero_grad()
        pair.backward(batch(step), True)
        pair.update()
    assert pair.differences() == []
    assert bitwise_equal(*(p.detach() for p in extra))
    assert not torch.equal(extra[0].detach(), torch.ones(3))


class _Nothing:
    def step(self):
        pass


def test_cycled_momentum_new_groups_a_loaded_state_and_parameters_outside_the_model(ranks):
    ranks(with_cycles, 2)


class Fresh:
    """Leaves the average in a new tensor."""

    def reduce(self, bucket):
        mean = yield commhub.AllReduce(bucket.flat.clone())
        bucket.flat = mean.clone()


def through_inner_hooks():
    pair = Pair(OPTIMIZERS["Adam"], hook=OptimizerOverlap(inner=Fresh()))
    for step in range(6):
        pair.step(batch(step), True)
        assert pair.differences() == [], step
    for inner in ("fp16", "powersgd(rank=1, start_step=2, min_compression_rate=0.5)", "quantize_per_channel"):
        for unused in (False, True):
            pair = Pair(OPTIMIZERS["SGD"], hook=f"optimizer_overlap(inner={inner})", find_unused_parameters=unused)
            commhub.register(pair.models[0], inner, timeout=30)
            for step in range(6):
                pair.step(batch(step), True)
                assert pair.differences() == [], (inner, unused, step)


def test_the_inner_hook_may_be_any_hook_and_leave_its_result_in_a_new_tensor(ranks):
    ranks(through_inner_hooks, 2)


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(6, 4, sparse=True, _weight=torch.arange(24.0).reshape(6, 4) / 24)
        self.head = nn.Parameter(torch.linspace(-1, 1, 12).reshape(4, 3))

    def forward(self, tokens):
        return (self.table(tokens) @ self.head).square().mean()


def with_sparse_gradients():
    models = [DistributedDataParallel(Tokens(), bucket_cap_mb=MANY) for _ in range(2)]
    optimizers = [[torch.optim.SparseAdam([m.module.table.weight]), torch.optim.Adam([m.module.head])] for m in models]
    commhub.register(models[1], "optimizer_overlap", optimizer=optimizers[1], timeout=30)
    for step in range(5):
        for model, several in zip(models, optimizers, strict=True):
            model.zero_grad()
            model(torch.tensor([step % 6, dist.get_rank()])).backward()
            for optimizer in several:
                optimizer.step()
        plain, hooked = ([p.detach() for p in model.parameters()] for model in models)
        assert all(map(bitwise_equal, plain, hooked)), step


def test_sparse_gradients_are_left_to_the_users_step(ranks):
    ranks(with_sparse_gradients, 2)
