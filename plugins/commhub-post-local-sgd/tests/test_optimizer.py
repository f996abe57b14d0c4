"""PostLocalSGDOptimizer: an optimizer in every respect, also where PyTorch's class of that name breaks."""

import copy
import pickle

import pytest
import torch
import torch.distributed as dist
from commhub_post_local_sgd import Periodic, PostLocalSGDOptimizer
from torch import nn

import commhub
from commhub.testing import Branches, EveryKind, assert_equal_across_ranks, batches, bitwise_equal, mlp

WIDTH = 8


def wrapped(module=None, averager="periodic(period=2)", make=None, **arguments):
    module = mlp() if module is None else module
    inner = make(module.parameters()) if make else torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    return module, inner, PostLocalSGDOptimizer(inner, averager, **arguments)


def loss_of(module, number):
    return module(*batches(WIDTH)(dist.get_rank() if dist.is_initialized() else 0, number)).square().mean()


def step(module, optimizer, number):
    optimizer.zero_grad()
    loss_of(module, number).backward()
    optimizer.step()


def parameters(module):
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def equal(a, b):
    return a.keys() == b.keys() and all(bitwise_equal(a[name], b[name]) for name in a)


def close(a, b):
    return a.keys() == b.keys() and all(torch.allclose(a[n], b[n], 1e-5, 1e-6) for n in a)


def equal_everywhere(tensors):
    try:
        assert_equal_across_ranks(tensors)
    except AssertionError:
        return False
    return True


def like_theirs():
    """The same training with PyTorch's class, where that works."""
    from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
    from torch.distributed.optim import PostLocalSGDOptimizer as Theirs

    module, _, optimizer = wrapped(averager=commhub.create("periodic", period=3, warmup_steps=2))
    other = mlp()
    inner = torch.optim.SGD(other.parameters(), lr=0.1, momentum=0.9)
    theirs = Theirs(inner, PeriodicModelAverager(period=3, warmup_steps=2))
    both = [torch.optim.lr_scheduler.ExponentialLR(o, 0.9) for o in (optimizer, theirs)]
    for number in range(9):
        for one, its_optimizer, scheduler in zip((module, other), (optimizer, theirs), both, strict=True):
            step(one, its_optimizer, number)
            scheduler.step()
        assert close(parameters(module), parameters(other)), number
        assert equal_everywhere(parameters(module)) == (number >= 2 and (number - 2) % 3 == 0), number
    ours, reference = optimizer.state_dict(), theirs.state_dict()
    assert ours.keys() == reference.keys()
    assert ours["step"] == reference["step"] == 9
    assert ours["param_groups"] == reference["param_groups"]


@pytest.mark.parametrize("nproc", [2, 4])
def test_it_trains_as_pytorch_s_does(ranks, nproc):
    ranks(like_theirs, nproc)


def test_it_is_an_optimizer_and_shares_everything_with_the_one_it_wraps():
    module, inner, optimizer = wrapped()
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert optimizer.param_groups is inner.param_groups
    assert (optimizer.state, optimizer.defaults, optimizer.optim) == (inner.state, inner.defaults, inner)
    assert repr(inner) in repr(optimizer)
    assert "period=2" in repr(optimizer)
    module(torch.ones(1, WIDTH)).sum().backward()
    optimizer.zero_grad(set_to_none=False)
    assert not any(p.grad.any() for p in module.parameters())
    optimizer.zero_grad()
    assert all(p.grad is None for p in module.parameters())


WRONG = {
    "a hook": ("allreduce", TypeError, "averages no parameters"),
    "another object": (object(), TypeError, "commhub.create"),
    "no periods": ("hierarchical", commhub.HookOptionError, "periods is None"),
    "no such name": ("perodic(period=2)", commhub.UnknownHookError, "perodic"),
    "buffers": ("periodic(period=2, buffers=true)", ValueError, "knows no buffers"),
}


@pytest.mark.parametrize(("averager", "error", "told"), WRONG.values(), ids=list(WRONG))
def test_an_averager_that_is_none_is_refused_at_once(averager, error, told):
    with pytest.raises(error, match=told):
        wrapped(averager=averager)


def test_what_is_no_optimizer_is_refused():
    with pytest.raises(TypeError, match=r"no torch\.optim\.Optimizer"):
        PostLocalSGDOptimizer(mlp(), "periodic(period=2)")


def test_it_can_be_made_before_the_process_group_and_says_so_in_the_first_step():
    module, _, optimizer = wrapped()
    loss_of(module, 0).backward()
    with pytest.raises(commhub.RegistrationError, match="init_process_group"):
        optimizer.step()


def schedulers():
    """Also after load_state_dict: PyTorch's class then holds groups that nobody steps with."""
    module, inner, optimizer = wrapped()
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    step(module, optimizer, 0)
    scheduler.step()
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert optimizer.param_groups is inner.param_groups
    scheduler.step()
    assert inner.param_groups[0]["lr"] == 0.025
    before = parameters(module)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    optimizer.zero_grad()
    loss_of(module, 1).backward()
    optimizer.step()
    assert equal(parameters(module), before)  # the rate is that of the steps taken


def closures_and_step_hooks():
    module, _, optimizer = wrapped()
    called = []
    optimizer.register_step_pre_hook(lambda *_: called.append("before"))
    optimizer.register_step_post_hook(lambda *_: called.append(equal_everywhere(parameters(module))))

    def closure():
        optimizer.zero_grad()
        loss = loss_of(module, 0)
        loss.backward()
        called.append("closure")
        return loss.item()

    assert optimizer.step(closure) > 0
    assert optimizer.step(closure) > 0
    assert called == ["before", "closure", True, "before", "closure", False]


def state_hooks():
    """What is registered for saving and loading runs in the wrapped optimizer, which does it."""
    _, _, optimizer = wrapped()
    called = []
    optimizer.register_state_dict_post_hook(lambda _, state: called.append("saved"))
    optimizer.register_load_state_dict_pre_hook(lambda _, state: called.append("loaded"))
    optimizer.load_state_dict(optimizer.state_dict())
    assert called == ["saved", "loaded"]


def lost_gradient():
    """A parameter without a gradient on one rank, or none anywhere, is averaged with its own kind."""
    rank = dist.get_rank()
    module, _, optimizer = wrapped(Branches(WIDTH), "periodic(period=1)")
    with torch.no_grad():
        for p in module.parameters():
            p.add_(float(rank))
    plain = copy.deepcopy(module)
    mirror = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9)
    for one in (module, plain):
        one(*batches(WIDTH)(rank, 0), both=rank == 0).square().mean().backward()
    mirror.step()
    for p in plain.parameters():
        dist.all_reduce(p.data)
        p.data /= dist.get_world_size()
    optimizer.step()
    assert close(parameters(module), parameters(plain))
    optimizer.zero_grad()
    optimizer.step()  # after zero_grad(), where PyTorch's raises
    assert equal_everywhere(parameters(module))


def in_place():
    rank = dist.get_rank()
    module, _, optimizer = wrapped(EveryKind(), "periodic(period=1)", lambda p: torch.optim.SGD(p, lr=0.1))
    kept = {name: (p.data_ptr(), p.stride(), p.dtype) for name, p in module.named_parameters()}
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.25 * rank)
    means = {}
    for name, p in module.named_parameters():
        total = p.detach().to(torch.complex128 if p.is_complex() else torch.float64, copy=True).contiguous()
        dist.all_reduce(total)
        means[name] = total / dist.get_world_size()
    optimizer.step()
    for name, p in module.named_parameters():
        assert (p.data_ptr(), p.stride(), p.dtype) == kept[name], name
        assert torch.allclose(p.detach().to(means[name].dtype), means[name], 1e-2, 1e-6), name


def momentum_too():
    module, inner, optimizer = wrapped(averager="periodic(period=2, optimizer_state=true)")
    for number in range(4):
        step(module, optimizer, number)
        momenta = {str(i): s["momentum_buffer"] for i, s in enumerate(inner.state.values())}
        assert equal_everywhere(momenta) == equal_everywhere(parameters(module)) == (number % 2 == 0)


def frozen():
    module = mlp()
    module[0].weight.requires_grad_(False)
    with torch.no_grad():
        module[0].weight.add_(float(dist.get_rank()))
    before = module[0].weight.detach().clone()
    _, _, optimizer = wrapped(module)
    step(module, optimizer, 0)
    assert bitwise_equal(module[0].weight.detach(), before)
    assert equal_everywhere({"other": module[2].weight.detach()})


def saved_and_loaded():
    module, inner, optimizer = wrapped(averager="periodic(period=4)")
    for number in range(3):
        step(module, optimizer, number)
    saved, weights = copy.deepcopy(optimizer.state_dict()), parameters(module)
    for number in range(3, 6):
        step(module, optimizer, number)
    again, _, resumed = wrapped(averager="periodic(period=4)")
    step(again, resumed, 0)  # what it did before counts no more
    again.load_state_dict(weights)
    resumed.load_state_dict(saved)
    assert resumed.state_dict()["step"] == 3
    for number in range(3, 6):
        step(again, resumed, number)
        assert equal_everywhere(parameters(again)) == (number == 4)
    assert equal(parameters(again), parameters(module))
    with pytest.warns(UserWarning, match="no 'step'"):
        resumed.load_state_dict(inner.state_dict())
    assert resumed.state_dict()["step"] == 0
    step(again, resumed, 6)  # the first step again
    assert equal_everywhere(parameters(again))


def copies():
    """A pickled or copied optimizer goes on as the first one would, on parameters of its own."""
    module, _, optimizer = wrapped(averager="periodic(period=4)", make=lambda p: torch.optim.Adam(p, lr=0.01))
    torch.optim.lr_scheduler.StepLR(optimizer, 2)  # which replaces the instance's step
    for number in range(3):
        step(module, optimizer, number)
    both = [copy.deepcopy((module, optimizer)), pickle.loads(pickle.dumps((module, optimizer)))]
    for number in range(3, 6):
        step(module, optimizer, number)
    for other, its_optimizer in both:
        assert its_optimizer.param_groups[0]["params"][0] is next(other.parameters())
        for number in range(3, 6):
            step(other, its_optimizer, number)
        assert equal(parameters(other), parameters(module))
        assert its_optimizer.state_dict()["step"] == 6


def more_parameters():
    module, late = mlp(), nn.Parameter(torch.full((3,), float(dist.get_rank())))
    _, _, optimizer = wrapped(module)
    step(module, optimizer, 0)
    averager = optimizer.averager
    optimizer.add_param_group({"params": [late], "lr": 0.5})
    assert [len(group["params"]) for group in optimizer.param_groups] == [4, 1]
    for number in range(1, 3):
        step(module, optimizer, number)
    assert optimizer.averager is averager
    assert late.tolist() == [(dist.get_world_size() - 1) / 2] * 3  # averaged after the third step
    assert equal_everywhere(parameters(module))


def shared_averager():
    averager = Periodic(period=2)
    first, second = wrapped(averager=averager), wrapped(averager=averager)
    step(first[0], first[2], 0)
    with pytest.raises(commhub.RegistrationError, match="at work already"):
        step(second[0], second[2], 0)


def it_is_freed():
    import threading

    module, _, optimizer = wrapped()
    step(module, optimizer, 0)
    before = threading.active_count()
    del optimizer
    assert threading.active_count() == before - 1


def all_of_it():
    for part in (
        schedulers,
        closures_and_step_hooks,
        state_hooks,
        lost_gradient,
        in_place,
        momentum_too,
        frozen,
        saved_and_loaded,
        copies,
        more_parameters,
        shared_averager,
        it_is_freed,
    ):
        try:
            part()
        except BaseException as error:
            error.add_note(f"in {part.__name__}")
            raise


@pytest.mark.parametrize("nproc", [2, 4])
def test_what_an_optimizer_does_and_what_breaks_elsewhere(ranks, nproc):
    ranks(all_of_it, nproc)


def under_scaler(unscale):
    """An Inf on rank 1 alone: PyTorch's class leaves the others waiting for ever."""
    rank = dist.get_rank()
    module, _, optimizer = wrapped()
    plain = copy.deepcopy(module)
    mirror = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for number in range(6):
        spoilt = rank == 1 and number in (1, 2, 5)
        optimizer.zero_grad()
        scaler.scale(loss_of(module, number) * (float("inf") if spoilt else 1.0)).backward()
        if unscale:
            scaler.unscale_(optimizer)
        before = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        assert (scaler.get_scale() < before) == spoilt
        mirror.zero_grad()
        loss_of(plain, number).backward()
        if not spoilt:
            mirror.step()
        if number % 2 == 0:
            for p in plain.parameters():
                dist.all_reduce(p.data)
                p.data /= dist.get_world_size()
        assert close(parameters(module), parameters(plain)), number
        assert equal_everywhere(parameters(module)) == (number % 2 == 0)
    return optimizer.state_dict()["step"]


@pytest.mark.parametrize("nproc", [2, 4])
@pytest.mark.parametrize("unscale", [False, True])
def test_a_loss_scaler_that_skips_on_one_rank_stops_nobody(ranks, nproc, unscale):
    assert ranks(under_scaler, nproc, unscale) == [6] * nproc


def fused_under_scaler():
    """A wrapped optimizer that knows of scalers is handed what the scaler found."""
    module, _, optimizer = wrapped(make=lambda p: torch.optim.SGD(p, lr=0.1, fused=True))
    plain = copy.deepcopy(module)
    mirror = torch.optim.SGD(plain.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for number, factor in enumerate([1.0, float("inf"), 1.0]):
        optimizer.zero_grad()
        scaler.scale(loss_of(module, number) * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        mirror.zero_grad()
        loss_of(plain, number).backward()
        if factor == 1.0:
            mirror.step()
    assert close(parameters(module), parameters(plain))


def test_a_fused_optimizer_under_a_loss_scaler(ranks):
    ranks(fused_under_scaler, 1)


def in_groups():
    rank = dist.get_rank()
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    module, _, optimizer = wrapped(process_group=groups[rank // 2])
    with pytest.raises(TypeError, match="process group cannot be pickled"):
        pickle.dumps(optimizer)
    module, optimizer = copy.deepcopy((module, optimizer))  # which stays in its group
    step(module, optimizer, 0)
    return parameters(module)


def test_the_group_that_is_given_averages(ranks):
    first, second, third, fourth = ranks(in_groups, 4)
    assert equal(first, second)
    assert equal(third, fourth)
    assert not equal(first, third)


def alone():
    module, _, optimizer = wrapped()
    plain = copy.deepcopy(module)
    mirror = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9)
    for number in range(3):
        step(module, optimizer, number)
        step(plain, mirror, number)
    assert equal(parameters(module), parameters(plain))


def test_a_single_rank_just_trains(ranks):
    ranks(alone, 1)
