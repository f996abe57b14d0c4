"""Ways to use a hook wrongly that would train wrongly in silence: each is one clear error."""

import attrs
import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import commhub


class Plain:
    def reduce(self, bucket):
        bucket.flat.copy_((yield commhub.AllReduce(bucket.flat)))


class TwoLevel:
    """Averages inside pairs, then over every second rank with an inner hook."""

    def __init__(self, inner):
        self.inner = inner

    def prepare(self, setup):
        p = setup.world_size
        self.pair = setup.partition([[r, r + 1] for r in range(0, p, 2)])
        self.across = setup.partition([list(range(0, p, 2)), list(range(1, p, 2))])
        if hasattr(self.inner, "prepare"):
            self.inner.prepare(setup.within(self.across))

    def reduce(self, bucket):
        bucket.flat.copy_((yield commhub.AllReduce(bucket.flat, group=self.pair)))
        yield from self.inner.reduce(bucket.part(bucket.parameters, self.across))


def net():
    torch.manual_seed(0)
    return DistributedDataParallel(torch.nn.Linear(8, 8))


def share_an_object():
    hook, first, second = Plain(), net(), net()
    registration = commhub.register(first, hook)
    with pytest.raises(commhub.RegistrationError, match="at work already"):
        commhub.register(second, hook)
    assert commhub.registration(second) is None
    registration.swap("allreduce")
    commhub.register(second, hook)
    second(torch.ones(1, 8)).sum().backward()
    commhub.register(second, hook)
    second(torch.ones(1, 8)).sum().backward()


def test_one_hook_object_on_two_models_is_refused(ranks):
    ranks(share_an_object, 2)


def inner_without_create():
    model = net()
    commhub.register(model, TwoLevel(Plain()))
    with pytest.raises(commhub.HookError, match=r"commhub\.create"):
        model(torch.ones(1, 8)).sum().backward()
    model.zero_grad()
    commhub.register(model, TwoLevel(commhub.create("allreduce")))
    model(torch.full((1, 8), float(dist.get_rank()))).sum().backward()
    assert torch.equal(model.module.weight.grad, torch.full((8, 8), 1.5))


def test_an_inner_hook_that_would_leave_its_subgroup_is_found_out(ranks):
    ranks(inner_without_create, 4)


def lacks_its_optimizer():
    model = net()
    with pytest.raises(commhub.RegistrationError, match="needs optimizer="):
        commhub.register(model, "wants")
    commhub.register(model, "wants", optimizer=torch.optim.SGD(model.parameters(), 0.1))
    with pytest.raises(commhub.RegistrationError, match="works on cuda"):
        commhub.register(model, "elsewhere")
    assert commhub.registration(model).name == "wants"


def test_a_hook_that_lacks_what_it_needs_is_refused_at_registration(ranks, temporary_plugin):
    source = "class Plain:\n    def reduce(self, bucket):\n        yield from ()\n"
    hooks = {
        "wants": {"factory": "Plain", "needs": ("optimizer",)},
        "elsewhere": {"factory": "Plain", "devices": ("cuda",)},
    }
    temporary_plugin("commhub-foo", hooks=hooks, source=source)
    ranks(lacks_its_optimizer, 2)


class FailsAfterwards(Plain):
    def prepare(self, setup):
        setup.after_step(self.note)

    def note(self, step):
        if step == 1:
            raise ZeroDivisionError("planned")


def fail_after_a_step():
    model = net()
    registration = commhub.register(model, FailsAfterwards())
    model(torch.ones(1, 8)).sum().backward()
    with pytest.raises(commhub.HookError, match="after_step raised ZeroDivisionError: planned"):
        model(torch.ones(1, 8)).sum().backward()
    model.zero_grad()
    model(torch.full((1, 8), float(dist.get_rank()))).sum().backward()
    assert torch.equal(model.module.weight.grad, torch.full((8, 8), 0.5))
    assert registration.step == 3


def test_what_a_hook_does_after_a_step_may_fail_without_breaking_the_model(ranks):
    ranks(fail_after_a_step, 2)


@attrs.frozen
class WithSetting(Plain):
    rank: int


def disagree_on_a_setting():
    model = net()
    with pytest.raises(commhub.HookMismatchError, match=r"option rank \(rank 0: .*1.*; rank 1: .*2"):
        commhub.register(model, WithSetting(dist.get_rank() + 1))
    assert commhub.register(model, WithSetting(3)).options == {"rank": 3}


def test_hook_objects_with_different_settings_are_a_mismatch(ranks):
    ranks(disagree_on_a_setting, 2)
