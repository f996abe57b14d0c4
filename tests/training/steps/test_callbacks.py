"""What a hook is called back for: after each step, with the averages in place, and once when its registration ends."""

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import commhub
from commhub import AllReduce, RegistrationError
from commhub.testing import batches, bitwise_equal, mlp


class Told:
    """The plain average; keeps what it is told."""

    def __init__(self, *, fails=False):
        self.fails, self.ends, self.seen = fails, 0, []

    def prepare(self, setup):
        self.parameters = setup.parameters
        setup.after_step(self.look)
        setup.at_end(self.end)
        if self.fails:
            raise ValueError("planned")

    def look(self, step):
        self.seen.append((step, [p.grad.clone() for p in self.parameters]))

    def end(self):
        self.ends += 1

    def reduce(self, bucket):
        bucket.flat.copy_((yield AllReduce(bucket.flat)))


def backward(model, step):
    model.zero_grad()
    model(*batches(8)(dist.get_rank(), step)).square().mean().backward()


def after_each_step():
    for mode in ({}, {"gradient_as_bucket_view": True}, {"static_graph": True}):
        hook, model = Told(), DistributedDataParallel(mlp(), bucket_cap_mb=1e-6, **mode)
        commhub.register(model, hook)
        assert all(p is q for p, q in zip(hook.parameters, model.module.parameters(), strict=True))
        for number in range(3):
            backward(model, number)
            step, seen = hook.seen[-1]
            assert (step, len(hook.seen)) == (number, number + 1), mode
            assert all(bitwise_equal(p.grad, g) for p, g in zip(model.parameters(), seen, strict=True)), mode
    hook, module = Told(), mlp()
    registration = commhub.manual(module, hook)
    backward(module, 0)
    registration.average()
    assert all(bitwise_equal(p.grad, g) for p, g in zip(module.parameters(), hook.seen[0][1], strict=True))


def test_after_a_step_the_averages_are_where_the_user_reads_them(ranks):
    ranks(after_each_step, 2)


def at_its_end():
    model = DistributedDataParallel(mlp())
    first, second, third, fourth = (Told() for _ in range(4))
    registration = commhub.register(model, first)
    registration.swap(second)
    assert (first.ends, second.ends) == (1, 0)
    other = commhub.register(model, third)
    assert (first.ends, second.ends, third.ends) == (1, 1, 0)
    other.remove()
    assert third.ends == 1
    refused = Told(fails=dist.get_rank() == 1)
    with pytest.raises((ValueError, RegistrationError)):
        commhub.register(model, refused)
    assert refused.ends == 1
    commhub.register(model, fourth).close()
    backward(model.module, 0)
    assert [hook.ends for hook in (first, second, third, fourth)] == [1, 1, 1, 1]


def test_a_hook_is_told_once_that_its_registration_has_ended(ranks):
    ranks(at_its_end, 2)


class Unspeakable(Exception):
    def __str__(self):
        raise ValueError("no text")


ODD = {"ordinary": lambda: ZeroDivisionError("planned"), "exit": lambda: SystemExit(3), "unspeakable": Unspeakable}


class FailsAtItsEnd(Told):
    def __init__(self, kind):
        super().__init__()
        self.kind = kind

    def end(self):
        super().end()
        raise ODD[self.kind]()


def fail_at_the_end():
    told = []
    for kind in ODD:
        hook, model = FailsAtItsEnd(kind), DistributedDataParallel(mlp())
        commhub.register(model, hook).swap("allreduce")
        backward(model, 0)
        told.append((hook.ends, all(bool(torch.isfinite(p.grad).all()) for p in model.parameters())))
    return told


def test_a_hook_that_fails_at_its_end_leaves_its_successor_at_work(ranks):
    assert ranks(fail_at_the_end, 2) == [[(1, True)] * len(ODD)] * 2


class FailsAfterAStep(Told):
    def __init__(self, kind):
        super().__init__()
        self.kind = kind

    def look(self, step):
        if step == 0:
            raise ODD[self.kind]()


def fail_after_a_step():
    for kind in ODD:
        model = DistributedDataParallel(mlp())
        registration = commhub.register(model, FailsAfterAStep(kind))
        with pytest.raises(commhub.HookError, match=f"after_step raised {type(ODD[kind]()).__name__}"):
            backward(model, 0)
        backward(model, 1)
        assert registration.step == 2


def test_whatever_is_raised_after_a_step_is_one_error_and_the_next_step_is_well(ranks):
    ranks(fail_after_a_step, 2)
