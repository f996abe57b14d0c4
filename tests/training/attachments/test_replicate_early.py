"""Before the first forward, which makes the DDP model of ``replicate()``, there is a whole registration already."""

import gc
import threading
import time
import weakref

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed._composable import replicate

import commhub
from commhub.testing import assert_equal_across_ranks, batches, bitwise_equal, mlp


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def train(model, steps=3, first=0):
    """Steps on batches of this rank's own; the gradients of the last, by name."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for number in range(first, first + steps):
        optimizer.zero_grad()
        model(*batches(8)(dist.get_rank(), number)).square().mean().backward()
        optimizer.step()
    return gradients(model)


def bare():
    torch.manual_seed(3)
    return mlp()


def same(one, other):
    assert one.keys() == other.keys()
    assert all(bitwise_equal(one[name], other[name]) for name in one)


def checked_at_once():
    model = replicate(bare())
    with pytest.raises(commhub.UnknownHookError):
        commhub.register(model, "no-such-hook", timeout=20)
    with pytest.raises(commhub.HookOptionError):
        commhub.register(model, "powersgd", rank="two", timeout=20)
    with pytest.raises(commhub.HookMismatchError, match="rank"):
        commhub.register(model, "powersgd", rank=1 + dist.get_rank(), timeout=20)
    odd = replicate(nn.Linear(4, 4 + dist.get_rank()))
    with pytest.raises(commhub.HookMismatchError, match="weight"):
        commhub.register(odd, "allreduce", timeout=20)
    other = replicate(bare(), bucket_cap_mb=1 + dist.get_rank())
    with pytest.raises(commhub.HookMismatchError, match="bucket_cap_mb"):
        commhub.register(other, "allreduce", timeout=20)
    with pytest.raises(commhub.RegistrationError):  # one rank alone has a model that is none; its peers hear of it
        commhub.register(model if dist.get_rank() else None, "allreduce", timeout=20)
    assert commhub.registration(model) is None
    plain = replicate(bare())
    same(train(model), train(plain))


def test_what_is_wrong_is_said_at_once_and_leaves_no_trace(ranks):
    ranks(checked_at_once, 2)


def before_the_first_forward(folder):
    model, plain = replicate(bare()), replicate(bare())
    first = commhub.register(model, "fp16", timeout=20)
    registration = commhub.register(model, "powersgd_rank2", start_step=0, timeout=20)
    with pytest.raises(commhub.RegistrationError, match="removed"):
        first.swap("fp16")
    assert commhub.registration(model) is registration
    assert (registration.step, registration.stats.steps) == (0, 0)
    registration.load_state_dict(registration.state_dict())
    registration.save(folder)
    registration.load(folder)
    registration.swap("fp16")
    registration.schedule({2: "allreduce"})
    seen = []
    registration.observe(lambda bucket, requests: seen.append(bucket.names[0]))
    train(model, 3)
    assert str(registration) == "allreduce"
    assert registration.step == 3
    assert len(seen) == 3
    assert seen[0].endswith(("weight", "bias"))
    registration.remove()
    assert commhub.registration(model) is None
    train(plain, 3)
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        p.data.copy_(q)
    same(train(model), train(plain))


def test_before_the_first_forward_it_is_a_whole_registration(ranks, tmp_path):
    ranks(before_the_first_forward, 2, str(tmp_path))


def removed_before():
    model, plain = replicate(bare()), replicate(bare())
    registration = commhub.register(model, "fp16", timeout=20)
    registration.remove()
    assert commhub.registration(model) is None
    same(train(model), train(plain))
    state = replicate.state(model)
    assert state._ddp_weakref()._get_ddp_logging_data().get("comm_hook", "") == ""
    commhub.register(model, "allreduce", timeout=20)
    same(train(model), train(plain))


def test_one_that_is_removed_before_the_first_forward_leaves_no_trace(ranks):
    ranks(removed_before, 2)


def given_up():
    model = replicate(bare())
    commhub.register(model, "fp16", timeout=20)  # nobody holds what it returns
    train(model)
    assert str(commhub.registration(model)) == "fp16"
    assert commhub.registration(model).step == 3


def test_the_model_holds_its_registration(ranks):
    ranks(given_up, 2)


def changed_between():
    model = replicate(bare())
    registration = commhub.register(model, "allreduce", timeout=20)
    model[2].requires_grad_(False)
    for _ in range(2):
        with pytest.raises(commhub.RegistrationError, match=r"'2\.weight' changed between.*swap"):
            model(torch.ones(2, 8))
    registration.swap("fp16")
    model(torch.full((2, 8), 1.0 + dist.get_rank())).sum().backward()
    assert registration.step == 1
    assert_equal_across_ranks([p.grad for p in model[0].parameters()])
    other = replicate(bare())
    old = commhub.register(other, "allreduce", timeout=20)
    other[0].requires_grad_(False)
    new = commhub.register(other, "allreduce", timeout=20)
    with pytest.raises(commhub.RegistrationError, match="removed"):
        old.swap("fp16")
    other(torch.full((2, 8), 1.0 + dist.get_rank())).sum().backward()
    assert new.step == 1
    third = replicate(bare())
    third.requires_grad_(dist.get_rank() == 0)
    started = time.monotonic()
    with pytest.raises(commhub.RegistrationError, match="no trainable parameters"):  # rank 0 hears of it at once
        commhub.register(third, "allreduce", timeout=20)
    assert time.monotonic() - started < 10


def test_parameters_that_change_before_the_first_forward_are_told(ranks):
    ranks(changed_between, 2)


def evaluated_first():
    model, plain = replicate(bare()), replicate(bare())
    registration = commhub.register(model, "allreduce", timeout=20)
    for one in (model, plain):
        one.eval()
        with torch.no_grad():
            one(torch.ones(2, 8))
        one.train()
    same(train(model), train(plain))
    assert registration.step == 3


def test_the_first_forward_may_be_an_evaluation(ranks):
    ranks(evaluated_first, 2)


def let_go(forward):
    before = threading.active_count()
    model = replicate(bare())
    reference = weakref.ref(model)
    commhub.register(model, "fp16", timeout=20)
    assert threading.active_count() > before
    if forward:
        train(model, 1)
    del model
    gc.collect()
    assert reference() is None
    deadline = time.monotonic() + 10
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.02)
    assert threading.active_count() == before


@pytest.mark.parametrize("forward", [False, True])
def test_nothing_outlives_the_model(ranks, forward):
    ranks(let_go, 2, forward)


def loaded_between():
    model, plain = replicate(bare()), replicate(bare())
    commhub.register(model, "allreduce", timeout=20)
    if dist.get_rank() == 0:  # replicate() sends rank 0's parameters in the first forward, and still does
        for one in (model, plain):
            with torch.no_grad():
                one[0].weight.mul_(3)
    same(train(model), train(plain))


def test_the_ddp_model_is_made_when_it_would_be_without_a_hook(ranks):
    ranks(loaded_between, 2)


def compiled():
    plain = replicate(bare())
    model = replicate(bare())
    registration = commhub.register(torch.compile(model, backend="eager"), "allreduce", timeout=20)
    assert commhub.registration(model) is registration
    whole = torch.compile(model, backend="eager")
    for number in range(3):
        for one, called in ((plain, plain), (model, whole)):
            one.zero_grad()
            called(*batches(8)(dist.get_rank(), number)).square().mean().backward()
        same(gradients(model), gradients(plain))
    assert registration.step == 3


def test_a_compiled_module(ranks):
    ranks(compiled, 2, fresh=True)
