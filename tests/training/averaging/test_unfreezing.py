"""Parameters that are unfrozen, frozen, added or replaced while training goes on are averaged with the others."""

import logging

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import commhub
from commhub.testing import bitwise_equal


class Net(nn.Module):
    def __init__(self, *, frozen=True):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.middle, self.last = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 4)
        self.extra = nn.Identity()
        self.middle.requires_grad_(not frozen)

    def forward(self, x):
        return self.extra(self.last(self.middle(self.first(x).relu()).relu()))


class Trainer:
    """One rank's training, on batches of its own: through DDP or a bare module, with an averager or a hook."""

    def __init__(self, hook, how, net=Net, momentum=0.0, **options):
        self.module = net()
        self.optimizer = torch.optim.SGD(self.module.parameters(), lr=0.1, momentum=momentum)
        self.manual = how == "manual"
        if self.manual:
            given = {} if "optimizer_state" not in hook else {"optimizer": self.optimizer}
            self.registration = commhub.manual(self.module, hook, timeout=20, **given, **options)
            self.model = self.module
        else:
            self.model = DistributedDataParallel(self.module, find_unused_parameters=True)
            self.registration = commhub.register(self.model, hook, optimizer=self.optimizer, timeout=20, **options)
        self.number = 0
        self.averages_gradients = hook.partition("(")[0] in ("allreduce", "fp16", "powersgd", "quantize_per_tensor")

    def backward(self):
        self.optimizer.zero_grad()
        generator = torch.Generator().manual_seed(100 * self.number + dist.get_rank())
        self.model(torch.randn(4, 8, generator=generator)).square().mean().backward()
        self.number += 1

    def step(self, count=1):
        for _ in range(count):
            self.backward()
            if self.manual and self.averages_gradients:
                self.registration.average()
            self.optimizer.step()
            if self.manual and not self.averages_gradients:
                self.registration.average()


def apart(module):
    """The parameters that differ between ranks."""
    different = []
    for name, parameter in module.named_parameters():
        every = [torch.empty_like(parameter.detach()) for _ in range(dist.get_world_size())]
        dist.all_gather(every, parameter.detach().contiguous())
        if not all(bitwise_equal(every[0], one) for one in every):
            different.append(name)
    return different


def unfreeze(module):
    module.middle.requires_grad_(True)


def by_hand(period, steps, changes):
    """Local SGD of `periodic(period)`, computed plainly: the mean in float64 after steps 0, period, 2 period, ..."""
    module = Net()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    for number in range(steps):
        changes.get(number, lambda _: None)(module)
        optimizer.zero_grad()
        generator = torch.Generator().manual_seed(100 * number + dist.get_rank())
        module(torch.randn(4, 8, generator=generator)).square().mean().backward()
        optimizer.step()
        if number % period == 0:
            for parameter in module.parameters():
                wide = parameter.detach().double()
                dist.all_reduce(wide)
                with torch.no_grad():
                    parameter.copy_(wide / dist.get_world_size())
    return module


def unfrozen(how, period):
    trainer = Trainer(f"periodic(period={period})", how)
    trainer.step(3)
    unfreeze(trainer.module)
    trainer.step(period * 3)
    wanted = by_hand(period, 3 + period * 3, {3: unfreeze})
    for (name, mine), other in zip(trainer.module.named_parameters(), wanted.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6, msg=name)
    trainer.registration.remove()
    assert apart(trainer.module) == []


@pytest.mark.parametrize("how", ["ddp", "manual"])
@pytest.mark.parametrize(("nproc", "period"), [(2, 1), (3, 2)])
def test_what_is_unfrozen_is_averaged_like_the_rest(ranks, how, nproc, period):
    ranks(unfrozen, nproc, how, period)


def froze_again():
    for how in ("ddp", "manual"):
        trainer = Trainer("periodic(period=4)", how)
        trainer.step(2)
        unfreeze(trainer.module)
        trainer.step()
        trainer.module.middle.requires_grad_(False)
        trainer.module.first.requires_grad_(False)
        trainer.module.extra = nn.Linear(4, 4)
        trainer.optimizer.add_param_group({"params": [*trainer.module.extra.parameters()]})
        trainer.step()
        trainer.module.extra.requires_grad_(False)
        trainer.step()  # the average after step 4
        assert apart(trainer.module) == [], how
        trainer.registration.remove()
        assert apart(trainer.module) == [], how


def test_what_was_trained_between_two_averages_is_averaged_though_it_is_frozen_by_then(ranks):
    ranks(froze_again, 2)


def last_average():
    for how in ("ddp", "manual"):
        trainer = Trainer("periodic(period=100)", how)
        trainer.step(2)
        unfreeze(trainer.module)
        trainer.step(2)
        assert "middle.weight" in apart(trainer.module)
        trainer.registration.remove()
        assert apart(trainer.module) == [], how


def test_after_remove_all_ranks_hold_the_same(ranks):
    ranks(last_average, 2)


def other_layers(how):
    trainer = Trainer("periodic(period=2)", how)
    trainer.step(2)
    trainer.module.extra = nn.Linear(4, 4)
    trainer.module.last = nn.Linear(16, 4)
    new = [*trainer.module.extra.parameters(), *trainer.module.last.parameters()]
    trainer.optimizer.add_param_group({"params": new})
    with torch.no_grad():
        trainer.module.extra.weight.add_(dist.get_rank())
    trainer.step(1)
    assert apart(trainer.module) == []
    trainer.module.extra = nn.Identity()
    trainer.step(2)
    assert apart(trainer.module) == []
    trainer.module.last.weight.data = torch.ones(4, 16, dtype=torch.float64)[:, :8].float()
    trainer.module.middle = nn.Linear(16, 8)
    unfreeze(trainer.module)
    trainer.optimizer.add_param_group({"params": [*trainer.module.middle.parameters()]})
    trainer.step(2)
    assert apart(trainer.module) == []


@pytest.mark.parametrize("how", ["ddp", "manual"])
def test_layers_that_were_added_replaced_resized_or_taken_away_are_no_obstacle(ranks, how):
    ranks(other_layers, 2, how)


def momentum():
    trainer = Trainer("periodic(period=2, optimizer_state=true)", "manual", momentum=0.9)
    trainer.step(3)
    unfreeze(trainer.module)
    trainer.step(2)
    buffers = [trainer.optimizer.state[p]["momentum_buffer"] for p in trainer.module.parameters()]
    assert len(buffers) == 6
    for buffer in buffers:
        other = buffer.clone()
        dist.broadcast(other, 0)
        assert bitwise_equal(other, buffer)


def test_the_optimizers_state_of_what_is_unfrozen_is_averaged_too(ranks):
    ranks(momentum, 2)


class Counting(nn.Module):
    """Its buffer is another tensor after each step, as statistics that are not kept in place are."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(8, 4)
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, x):
        self.seen = self.seen + 1 + dist.get_rank()
        return self.layer(x)


def buffers():
    trainer = Trainer("periodic(period=2, buffers=true)", "manual", net=Counting)
    trainer.step(3)
    assert trainer.module.seen.item() == 4.5  # 1.5 after the first step, and 3 more in the mean of two steps


def test_a_buffer_that_was_replaced_is_averaged_itself(ranks):
    ranks(buffers, 2)


def on_one_rank(how, hook, change, asked):
    trainer = Trainer(hook, how)
    trainer.step(2)
    if dist.get_rank() == 1:
        change(trainer.module)
    told = []
    for _ in range(2):
        try:
            trainer.step(2)
        except commhub.HookError as error:
            told.append(str(error))
    assert told, "nobody said anything"
    assert all(asked in text for text in told), told
    assert "rank 1 alone" in told[-1] or "rank 0 alone" in told[-1], told
    for name in ("middle", "last"):
        setattr(trainer.module, name, getattr(Net(), name))
    unfreeze(trainer.module)
    trainer.optimizer = torch.optim.SGD(trainer.module.parameters(), lr=0.1)
    trainer.manual = how == "manual"
    trainer.step(4) if trainer.manual else None
    trainer.registration.remove()
    return len(told)


def resize(module):
    module.last = nn.Linear(16, 4, bias=False)


@pytest.mark.parametrize(
    ("how", "hook"),
    [("ddp", "periodic(period=2)"), ("manual", "periodic(period=2)"), ("manual", "powersgd(start_step=2)")],
)
def test_what_one_rank_alone_unfreezes_or_takes_away_is_named_on_all_ranks(ranks, how, hook):
    assert len(set(ranks(on_one_rank, 3, how, hook, unfreeze, "'middle.weight'"))) == 1
    if how == "manual":
        ranks(on_one_rank, 2, how, hook, resize, "'last.")


def halves():
    """Pairs average often, all four seldom; one pair unfreezes, the other follows later."""
    trainer = Trainer("hierarchical(periods={1: 2, 4: 4})", "manual")
    trainer.step(2)
    if dist.get_rank() < 2:
        unfreeze(trainer.module)
    trainer.step(1)
    unfreeze(trainer.module)
    trainer.step(2)
    assert apart(trainer.module) == []
    trainer.registration.remove()


def test_each_group_agrees_for_itself(ranks):
    ranks(halves, 4)


def with_a_hook(hook, tolerance):
    trainer = Trainer(hook, "manual")
    texts = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: texts.append(record.getMessage())
    logging.getLogger("commhub").addHandler(handler)
    trainer.step(2)
    unfreeze(trainer.module)
    trainer.module.extra = nn.Linear(4, 4)
    for _ in range(3):
        trainer.backward()
        local = {name: p.grad.clone() for name, p in trainer.module.named_parameters()}
        trainer.registration.average()
        for name, parameter in trainer.module.named_parameters():
            wide = local[name].double()
            dist.all_reduce(wide)
            wanted = (wide / dist.get_world_size()).float()
            closeness = 1e-6 if name.startswith(("middle", "extra")) else tolerance
            if closeness is not None:
                torch.testing.assert_close(parameter.grad, wanted, rtol=closeness, atol=closeness, msg=name)
    said = len(texts)
    trainer.registration.swap(hook)
    trainer.backward()
    trainer.registration.average()
    assert len(texts) == said
    logging.getLogger("commhub").removeHandler(handler)
    served = trainer.registration.state_dict()["local"][f"rank{dist.get_rank()}"]
    return texts, sorted(served)


@pytest.mark.parametrize(("hook", "tolerance"), [("allreduce", 1e-6), ("fp16", 1e-3), ("powersgd(rank=1)", None)])
def test_a_hook_on_a_bare_module_leaves_what_is_unfrozen_to_a_plain_mean_until_it_is_swapped(ranks, hook, tolerance):
    (texts, served), (others, _) = ranks(with_a_hook, 2, hook, tolerance)
    (text,) = texts
    assert "'middle.weight'" in text
    assert "'extra.weight'" in text
    assert "swap" in text
    assert others == []
    assert ("middle.weight" in served) == hook.startswith("powersgd")  # with a residual of its own from then on


def with_and_without_gradients():
    """A parameter that was unfrozen and has a gradient on one rank only, and one that has none at all."""
    trainer = Trainer("powersgd", "manual")
    trainer.step(1)
    unfreeze(trainer.module)
    trainer.backward()
    if dist.get_rank() == 0:
        trainer.module.middle.weight.grad = None
    trainer.module.middle.bias.grad = None
    trainer.module.middle.weight.grad = None if dist.get_rank() == 0 else torch.ones(16, 16)
    trainer.registration.average()
    assert torch.equal(trainer.module.middle.weight.grad, torch.full((16, 16), 0.5))
    assert trainer.module.middle.bias.grad is None


def test_what_was_unfrozen_counts_as_zero_where_it_has_no_gradient(ranks):
    ranks(with_and_without_gradients, 2)


class Remembers:
    """Adds up what it averaged, in a state of its own; `known` are the names it was told of."""

    def __init__(self, period=2):
        self.period, self.known = period, []

    def prepare(self, setup):
        self.everyone, self.state = setup.partition([range(setup.world_size)]), setup.state
        self.extend(setup)

    def extend(self, setup):
        for name, parameter in zip(setup.names, setup.parameters, strict=True):
            self.known.append(name)
            setup.state.shared(name)["first"] = parameter.detach().clone()

    def due(self, step):
        return self.everyone if step % self.period == 0 else None

    def reduce(self, bucket):
        assert set(bucket.names) <= set(self.known)
        bucket.flat.copy_((yield commhub.AllReduce(bucket.flat)))


def extended():
    averager = Remembers()
    module = Net()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    registration = commhub.manual(module, averager, timeout=20)
    for number in range(7):
        if number == 3:
            unfreeze(module)
        optimizer.zero_grad()
        generator = torch.Generator().manual_seed(100 * number + dist.get_rank())
        module(torch.randn(4, 8, generator=generator)).square().mean().backward()
        optimizer.step()
        registration.average()
        if number == 4:
            first = module.middle.weight.detach().clone()
            assert averager.known[-2:] == ["middle.weight", "middle.bias"]
    kept = registration.state_dict()["shared"]["middle.weight"]["first"]
    assert bitwise_equal(kept, first)
    assert apart(module) == []


def test_an_averager_with_a_memory_is_told_of_what_was_unfrozen_once_it_is_equal_everywhere(ranks):
    ranks(extended, 2)
