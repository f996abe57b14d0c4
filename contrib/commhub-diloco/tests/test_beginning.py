"""Where the outer steps begin: at the weights that training begins with, however and whenever these were set."""

import copy
import io

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import commhub
from commhub.testing import assert_equal_across_ranks, batches, bitwise_equal, mlp

LR = 0.1
WIDTHS = [8, 16, 4]
HOOK = "diloco(period=2)"


def weights(seed=7):
    """Others than those at registration."""
    return {name: 2 * p.detach().clone() for name, p in mlp(WIDTHS, seed=seed).state_dict().items()}


def local_step(model, optimizer, step):
    optimizer.zero_grad()
    model(*batches(8)(dist.get_rank(), step)).square().mean().backward()
    optimizer.step()


class ByHand:
    """DiLoCo of all ranks in float64, with a period of 2, from given weights."""

    def __init__(self, start):
        self.models = [mlp(WIDTHS).double() for _ in range(dist.get_world_size())]
        self.own = [dict(model.named_parameters()) for model in self.models]
        self.begin(start)

    @torch.no_grad()
    def begin(self, start):
        self.theta = {name: x.detach().double() for name, x in start.items()}
        self.momentum = {name: torch.zeros_like(x) for name, x in self.theta.items()}
        self.steps = 0
        for mine in self.own:
            for name, x in mine.items():
                x.copy_(self.theta[name])

    def step(self, number):
        for rank, model in enumerate(self.models):
            model.zero_grad()
            model(batches(8)(rank, number)[0].double()).square().mean().backward()
        with torch.no_grad():
            for mine in self.own:
                for x in mine.values():
                    x -= LR * x.grad
            self.steps += 1
            if self.steps % 2 == 0:
                for name in self.theta:
                    delta = sum(self.theta[name] - mine[name] for mine in self.own) / len(self.own)
                    self.momentum[name] = 0.9 * self.momentum[name] + delta
                    self.theta[name] = self.theta[name] - 0.7 * (delta + 0.9 * self.momentum[name])
                    for mine in self.own:
                        mine[name].copy_(self.theta[name])

    def assert_like(self, module, case):
        for name, x in module.named_parameters():
            expected = self.own[dist.get_rank()][name].detach()
            torch.testing.assert_close(x.detach().double(), expected, rtol=1e-5, atol=1e-6, msg=f"{case}, {name}")


def wrapped(hook=HOOK):
    model = DistributedDataParallel(mlp(WIDTHS))
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    return model, optimizer, commhub.register(model, hook, optimizer=optimizer, timeout=20)


@torch.no_grad()
def copied(module):
    for name, p in module.named_parameters():
        p.copy_(weights()[name])


def copied_through_data(module):
    for name, p in module.named_parameters():
        p.data.copy_(weights()[name])


def loaded_in_parts(module):
    for prefix in ("0.", "2."):
        part = {name.removeprefix(prefix): x for name, x in weights().items() if name.startswith(prefix)}
        module.get_submodule(prefix[:-1]).load_state_dict(part)


SETTING = {
    "loaded": lambda module: module.load_state_dict(weights()),
    "loaded in parts": loaded_in_parts,
    "copied": copied,
    "copied through data": copied_through_data,
}


def in_ddp():
    for case, setting in SETTING.items():
        model, optimizer, _ = wrapped()
        model(torch.ones(1, 8))  # a look at the model before there are weights
        setting(model.module)
        by_hand = ByHand(weights())
        for number in range(5):
            local_step(model, optimizer, number)
            by_hand.step(number)
            by_hand.assert_like(model.module, (case, number))


def test_weights_that_are_set_after_registration_are_where_the_outer_steps_begin(ranks):
    ranks(in_ddp, 2)


def after_a_swap():
    """The former averager's last average is where the outer steps begin, the same on all ranks."""
    model, optimizer, registration = wrapped("periodic(period=100, warmup_steps=50)")
    for number in range(3):
        local_step(model, optimizer, number)
    registration.swap(HOOK)
    by_hand = ByHand(dict(model.module.named_parameters()))
    by_hand.steps = 3
    for number in range(3, 8):
        local_step(model, optimizer, number)
        by_hand.step(number)
        by_hand.assert_like(model.module, number)


def test_the_outer_steps_begin_where_a_swap_has_left_the_parameters(ranks):
    ranks(after_a_swap, 2)


def on_a_bare_module():
    """Steps are counted after the optimizer's: the parameters that it was about to change are looked at."""
    for given in (True, False):
        for case, setting in SETTING.items():
            module = mlp(WIDTHS)
            optimizer = torch.optim.SGD(module.parameters(), lr=LR)
            more = {"optimizer": optimizer} if given else {}
            registration = commhub.manual(module, HOOK, timeout=20, **more)
            setting(module)
            by_hand = ByHand(weights())
            for number in range(5):
                local_step(module, optimizer, number)
                registration.average()
                by_hand.step(number)
                by_hand.assert_like(module, (given, case, number))


def test_so_do_those_of_a_bare_module(ranks):
    ranks(on_a_bare_module, 2)


def loaded_later():
    """Weights that are loaded while training begin it again, without the momentum of those they replace; in whatever
    state the average before is. Loading into a copy of the module does nothing to the one that trains."""
    for given in (True, False):
        for steps in (3, 4):  # the second ends with an average, which without an optimizer is still due
            model = DistributedDataParallel(mlp(WIDTHS))
            optimizer = torch.optim.SGD(model.parameters(), lr=LR)
            more = {"optimizer": optimizer} if given else {}
            commhub.register(model, HOOK, timeout=20, **more)
            for number in range(steps):
                local_step(model, optimizer, number)
            mean = copy.deepcopy(model.module)
            model.module.load_state_dict(weights())
            model(torch.ones(1, 8))
            by_hand = ByHand(weights())
            by_hand.steps = steps
            for number in range(steps, 9):
                mean.load_state_dict(weights(3))
                local_step(model, optimizer, number)
                by_hand.step(number)
                if number % 2 == 0 or given:
                    by_hand.assert_like(model.module, (given, steps, number))


def test_weights_loaded_while_training_begin_it_again(ranks):
    ranks(loaded_later, 2)


def removed_after_loading():
    model, optimizer, registration = wrapped()
    for number in range(3):
        local_step(model, optimizer, number)
    model.load_state_dict({f"module.{name}": x for name, x in weights().items()})
    registration.remove()
    assert all(bitwise_equal(p.detach(), weights()[name]) for name, p in model.module.named_parameters())
    assert not any(module._load_state_dict_post_hooks for module in model.modules())


def test_the_last_average_leaves_weights_alone_that_were_just_loaded(ranks):
    ranks(removed_after_loading, 2)


def own(model):
    return {name: x.detach().clone() for name, x in model.module.named_parameters()}


def resumed():
    """State and weights, in either order, go on bit by bit, whatever was loaded before; also from before any step."""
    for steps in (0, 3):
        model, optimizer, registration = wrapped()
        model.module.load_state_dict(weights())
        for number in range(steps):
            local_step(model, optimizer, number)
        saved, mine = registration.state_dict(), own(model)
        for number in range(steps, 7):
            local_step(model, optimizer, number)
        expected, kept = own(model), registration.state_dict()["shared"]
        for weights_first in (True, False):
            again, optimizer, registration = wrapped()
            again.module.load_state_dict(weights(5))
            for number in range(2 if steps else 0):
                local_step(again, optimizer, number)
            if weights_first:
                again.module.load_state_dict(mine)
            registration.load_state_dict(saved)
            if not weights_first:
                again.module.load_state_dict(mine)
            again(torch.ones(1, 8))
            for number in range(steps, 7):
                local_step(again, optimizer, number)
            assert all(bitwise_equal(x, expected[name]) for name, x in own(again).items()), (steps, weights_first)
            found = registration.state_dict()["shared"]
            assert all(bitwise_equal(found[n][key], kept[n][key]) for n in kept for key in kept[n])


def test_state_and_weights_are_loaded_in_either_order(ranks):
    ranks(resumed, 2)


def carried_away():
    """The module that trains can be copied and saved whole; what is made of it trains by itself."""
    model, optimizer, _ = wrapped()
    buffer = io.BytesIO()
    torch.save(model.module, buffer)
    assert b"commhub" not in buffer.getvalue()
    for other in (copy.deepcopy(model.module), torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)):
        other.load_state_dict(weights())
        other(torch.ones(1, 8)).sum().backward()
    for number in range(4):
        local_step(model, optimizer, number)
    assert_equal_across_ranks(own(model))


def test_the_module_can_be_copied_and_saved_whole(ranks):
    ranks(carried_away, 2)
