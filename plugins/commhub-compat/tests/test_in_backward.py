"""Optimizers in backward: of a module by itself, of a DDP model, and sharded ones."""

import copy
import gc
import pickle
import weakref

import commhub_compat as compat
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

import commhub
from commhub.testing import batches, bitwise_equal, mlp


def equal(a, b):
    return all(bitwise_equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def trained(model, optimizer=None, steps=5):
    rank = dist.get_rank() if dist.is_initialized() else 0
    for number in range(steps):
        model(batches(8)(rank, number)[0]).square().mean().backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()
    return model


def test_a_module_by_itself_is_stepped_in_backward():
    mine, other = mlp(), mlp()
    compat._apply_optimizer_in_backward(torch.optim.Adam, mine.parameters(), {"lr": 0.1})
    trained(mine)
    trained(other, torch.optim.Adam(other.parameters(), lr=0.1))
    assert equal(mine, other)
    assert all(p.grad is None for p in mine.parameters())
    (optimizer,) = compat._get_in_backward_optimizers(mine)
    assert isinstance(optimizer, torch.optim.Adam)


def test_several_optimizers_step_one_parameter_one_after_the_other():
    mine, other = nn.Linear(8, 8), nn.Linear(8, 8)
    other.load_state_dict(mine.state_dict())
    for lr in (0.1, 0.2):
        compat._apply_optimizer_in_backward(torch.optim.SGD, mine.parameters(), {"lr": lr})
    trained(mine, steps=2)
    trained(other, torch.optim.SGD(other.parameters(), lr=0.1 + 0.2), steps=2)
    assert all(torch.allclose(a, b) for a, b in zip(mine.parameters(), other.parameters(), strict=True))
    assert len(compat._get_in_backward_optimizers(mine)) == 2


def test_without_a_hook_nothing_is_stepped_and_the_optimizer_is_there():
    mine = mlp()
    before = copy.deepcopy(mine)
    compat._apply_optimizer_in_backward(torch.optim.SGD, mine.parameters(), {"lr": 0.1}, register_hook=False)
    trained(mine, steps=1)
    assert equal(mine, before)
    assert len(compat._get_in_backward_optimizers(mine)) == 1


def test_modules_and_their_optimizers_are_freed():
    net = mlp()
    compat._apply_optimizer_in_backward(torch.optim.SGD, net.parameters(), {"lr": 0.1})
    kept = weakref.ref(net), *map(weakref.ref, compat._get_in_backward_optimizers(net))
    del net
    gc.collect()
    assert [one() for one in kept] == [None, None]


def in_ddp(before, modes):
    net, other = mlp(), mlp()
    kinds = ((torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}), (torch.optim.Adam, {"lr": 0.01}))
    halves = [list(net.parameters())[::2], list(net.parameters())[1::2]]

    def apply():
        for (kind, options), half in zip(kinds, halves, strict=True):
            compat._apply_optimizer_in_backward(kind, half, options)

    if before:
        apply()
    model, reference = (DistributedDataParallel(one, bucket_cap_mb=0.0005, **modes) for one in (net, other))
    if not before:
        apply()
    theirs = [list(other.parameters())[::2], list(other.parameters())[1::2]]
    optimizers = [kind(half, **options) for (kind, options), half in zip(kinds, theirs, strict=True)]
    for number in range(5):
        for one in (model, reference):
            one(batches(8)(dist.get_rank(), number)[0]).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        assert equal(net, other), number
        assert all(p.grad is None for p in net.parameters()), number
    registration = commhub.registration(model)
    assert registration.step == 5
    assert len(compat._get_in_backward_optimizers(net)) == 2
    assert not torch.nn.modules.module._global_forward_pre_hooks


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("view", [True, False], ids=["views", "copies"])
def test_in_a_ddp_model_it_trains_as_steps_after_backward_do(ranks, before, view):
    ranks(in_ddp, 2, before, {"gradient_as_bucket_view": view})


def sharded(make, mode):
    nets, models, zeros = [mlp() for _ in range(2)], [], []
    for net in nets:
        models.append(DistributedDataParallel(net, bucket_cap_mb=0.0005))
        zeros.append(ZeroRedundancyOptimizer(net.parameters(), torch.optim.Adam, lr=0.01))
    hook = make(compat.fp16_compress_hook, models[0], zeros[0])
    models[0].register_comm_hook(None, hook)
    commhub.register(models[1], f"zero_overlap(inner=fp16, mode={mode})", optimizer=zeros[1])
    for model, zero in zip(models, zeros, strict=True):
        trained(model, zero)
    assert equal(*nets)
    assert dict(commhub.registration(models[0]).options) == dict(commhub.registration(models[1]).options)


@pytest.mark.parametrize(
    ("name", "mode"), [("hook_with_zero_step", "stepwise"), ("hook_with_zero_step_interleaved", "interleaved")]
)
def test_a_hook_with_zero_step_is_zero_overlap(ranks, name, mode):
    ranks(sharded, 2, getattr(compat, name), mode)


def refused():
    net = mlp()
    model = DistributedDataParallel(net)
    overlapped = ZeroRedundancyOptimizer(net.parameters(), torch.optim.SGD, overlap_with_ddp=True, lr=0.1)
    with pytest.raises(commhub.RegistrationError, match="Leave that out"):
        compat.hook_with_zero_step(compat.allreduce_hook, model, overlapped)
    with pytest.raises(commhub.HookOptionError, match="no hook of commhub_compat"):
        compat.hook_with_zero_step(print, model, overlapped)


def test_what_cannot_be_stepped_in_backward_is_refused_at_once(ranks):
    ranks(refused, 2)


def test_a_parameter_is_saved_without_its_optimizers():
    net = nn.Linear(2, 2)
    compat._apply_optimizer_in_backward(torch.optim.SGD, net.parameters(), {"lr": 0.1})
    again = pickle.loads(pickle.dumps(net))
    assert compat._get_in_backward_optimizers(again) == []
    assert equal(net, again)


def in_fsdp(before, hook):
    options = {"optimizer_kwargs": {"lr": 0.01}, "register_hook": hook}
    cpu, policy = torch.device("cpu"), ModuleWrapPolicy({nn.Linear})
    flat = FullyShardedDataParallel(mlp(), device_id=cpu)
    compat._apply_optimizer_in_backward(torch.optim.Adam, flat.parameters(), **options)
    with pytest.raises(RuntimeError, match="only supported with use_orig_params=True"):
        flat(torch.ones(2, 8))

    net, other = mlp(), mlp()
    if before:
        compat._apply_optimizer_in_backward(torch.optim.Adam, net.parameters(), **options)
    model, reference = (
        FullyShardedDataParallel(one, auto_wrap_policy=policy, device_id=cpu, use_orig_params=True)
        for one in (net, other)
    )
    if not before:
        compat._apply_optimizer_in_backward(torch.optim.Adam, model.parameters(), **options)
    start = [p.detach().clone() for p in model.parameters() if p.numel()]
    trained(model)
    trained(reference, torch.optim.Adam(reference.parameters(), lr=0.01))
    assert equal(model, reference)
    assert not any(torch.equal(a, p) for a, p in zip(start, (p for p in model.parameters() if p.numel()), strict=True))
    assert len(compat._get_in_backward_optimizers(model)) == len(list(model.parameters()))
    assert not torch.nn.modules.module._global_forward_pre_hooks


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("hook", [True, False], ids=["hook", "no_hook"])
def test_fsdp_steps_what_it_has_taken(ranks, before, hook):
    ranks(in_fsdp, 2, before, hook)
