"""Post-local SGD in PyTorch's words: the hook's gradients, the averagers, the optimizer; held against PyTorch's own."""

import copy
import os
import pickle
from collections import OrderedDict

import commhub_compat as compat
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import post_localSGD_hook as their_hook
from torch.distributed.algorithms.model_averaging import averagers as theirs
from torch.distributed.algorithms.model_averaging.hierarchical_model_averager import (
    HierarchicalModelAverager as TheirHierarchical,
)
from torch.distributed.optim import PostLocalSGDOptimizer as TheirOptimizer
from torch.nn.parallel import DistributedDataParallel

import commhub
from commhub.testing import assert_equal_across_ranks, batches, mlp

EVERY = bool(os.environ.get("COMMHUB_EVERY_CHECK"))


def module():
    """The same on all ranks but for what each adds."""
    made = mlp()
    with torch.no_grad():
        for p in made.parameters():
            p.add_(dist.get_rank())
    return made


def close(a, b):
    return all(torch.allclose(x, y, 1e-5, 1e-6) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def step(model, optimizer, number):
    optimizer.zero_grad()
    model(batches(8)(dist.get_rank(), number)[0]).square().mean().backward()
    optimizer.step()


# The hook.


def gradients_as_theirs(local, given):
    nets = [mlp() for _ in range(2)]
    for net in nets[1:]:
        net.load_state_dict(nets[0].state_dict())
    rank, size = dist.get_rank(), dist.get_world_size()
    half = dist.new_subgroups(group_size=size // 2)[0] if given else None
    everyone = dist.group.WORLD
    models = [DistributedDataParallel(net, bucket_cap_mb=0.0005) for net in nets]
    state = compat.PostLocalSGDState(None, half, 2, local)
    models[0].register_comm_hook(state, compat.post_localSGD_hook)
    # theirs asks for the devices of a host where no subgroup is given; one host is everyone here
    models[1].register_comm_hook(
        their_hook.PostLocalSGDState(None, half if given else everyone, 2, local), their_hook.post_localSGD_hook
    )
    for number in range(4):
        for model in models:
            model.zero_grad()
            model(batches(8)(rank, number)[0]).square().mean().backward()
        for mine, other in zip(*(net.parameters() for net in nets), strict=True):
            assert torch.allclose(mine.grad, other.grad, 1e-5, 1e-7), number
        assert state.iter == min(number + 1, 2)
    commhub.registration(models[0]).close()


@pytest.mark.parametrize(("local", "given"), [(True, True), (True, False), (False, False)])
def test_gradients_are_pytorch_s(ranks, local, given):
    ranks(gradients_as_theirs, 4, local, given)


# The averagers.


def as_theirs(make, make_theirs, groups):
    mine, other = module(), module()
    averager, reference = make(), make_theirs()
    tensors = [list(m.parameters()) for m in (mine, other)]
    for number in range(18):
        for parameters in tensors:
            for place, p in enumerate(parameters):
                p.data = torch.full_like(p, number + place + 10 * dist.get_rank())
                p.grad = None if place == 1 else torch.ones_like(p)
        for one, parameters in ((averager, tensors[0]), (reference, tensors[1])):
            one.average_parameters([{"params": parameters[:2]}, {"params": parameters[2:]}] if groups else parameters)
        assert close(mine, other), number
        assert averager.step == reference.step
    return [list(dist.get_process_group_ranks(g)) for g in getattr(averager, "period_process_group_dict", {}).values()]


def periodic_as_theirs():
    for warmup in (0, 5):
        as_theirs(
            lambda w=warmup: compat.PeriodicModelAverager(4, w),
            lambda w=warmup: theirs.PeriodicModelAverager(4, w),
            groups=bool(warmup),
        )


def hierarchical_as_theirs():
    for levels in ([(2, 2), (4, 4)], [(2, 2), (3, 2), (5, 4)], [(2, 4), (3, 4)]):
        found = as_theirs(
            lambda one=levels: compat.HierarchicalModelAverager(OrderedDict(one), 3),
            lambda one=levels: TheirHierarchical(OrderedDict(one), 3),
            groups=False,
        )
        low = dist.get_rank() // 2 * 2
        assert found == [[low, low + 1] if size == 2 else [0, 1, 2, 3] for _, size in levels]


def test_averages_fall_due_when_pytorch_s_do_and_leave_what_has_no_gradient(ranks):
    ranks(periodic_as_theirs, 2)


def test_levels_need_be_no_multiples_and_periods_divide_the_step_itself(ranks):
    ranks(hierarchical_as_theirs, 4)


def without_gradients_too():
    net = module()
    for p in net.parameters():
        p.grad = None
    compat.PeriodicModelAverager(1000, without_gradient=True).average_parameters(net.parameters())
    assert_equal_across_ranks(dict(net.named_parameters()))


def test_what_has_no_gradient_is_averaged_if_asked_for(ranks):
    ranks(without_gradients_too, 2)


def counter_set():
    net, averager = module(), compat.PeriodicModelAverager(4, 8)
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    averager.step = 8
    averager.average_parameters(net.parameters())
    assert_equal_across_ranks(dict(net.named_parameters()))
    assert averager.step == 9
    other = nn.Linear(2, 2)
    other.weight.data.fill_(dist.get_rank())
    for p in other.parameters():
        p.grad = torch.ones_like(p)
    averager.step = 12
    averager.average_parameters(other.parameters())  # of another module
    assert other.weight[0, 0] == (dist.get_world_size() - 1) / 2
    with pytest.raises(commhub.HookOptionError, match="params hold a str"):
        averager.average_parameters(["weight"])


def test_its_step_may_be_set_and_its_parameters_may_change(ranks):
    ranks(counter_set, 2)


def periods_differ():
    net, averager = module(), compat.PeriodicModelAverager(4 + dist.get_rank())
    with pytest.raises(commhub.HookMismatchError, match="averager"):
        averager.average_parameters(net.parameters())


def test_ranks_whose_periods_differ_are_told_so(ranks):
    ranks(periods_differ, 2)


def refused_hierarchies():
    for levels, text in (
        ({}, "is empty"),
        ({0: 1, 2: 2}, "a period is 0"),
        ({2: 1}, "the last groups are of 1"),
        ({2: 3, 4: 2}, "not made of groups of 3"),
    ):
        with pytest.raises(commhub.HookOptionError, match=text):
            compat.HierarchicalModelAverager(levels)
    with pytest.raises(commhub.HookOptionError, match="warmup_steps"):
        compat.HierarchicalModelAverager({2: 2}, -1)
    with pytest.warns(UserWarning, match="as much as averaging gradients"):
        compat.HierarchicalModelAverager({1: 2})


def test_wrong_numbers_are_errors_where_they_are_written(ranks):
    with pytest.raises(commhub.HookOptionError, match="period is 0"):
        compat.PeriodicModelAverager(0)
    with pytest.raises(ValueError, match="warmup_steps is -1"):
        compat.PeriodicModelAverager(2, -1)
    with pytest.warns(UserWarning, match="as much as averaging gradients"):
        compat.PeriodicModelAverager(1)
    with pytest.raises(commhub.RegistrationError, match="init_process_group"):
        compat.HierarchicalModelAverager({2: 2})
    ranks(refused_hierarchies, 2)


# The optimizer.


def optimizer_as_theirs(hierarchical):
    nets = mlp(), mlp()
    made = (
        (compat.HierarchicalModelAverager if hierarchical else compat.PeriodicModelAverager),
        (TheirHierarchical if hierarchical else theirs.PeriodicModelAverager),
    )
    arguments = (OrderedDict([(2, 2), (4, 4)]), 4) if hierarchical else (3, 2)
    averagers = [one(*arguments) for one in made]
    inner = [torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9) for net in nets]
    mine = compat.PostLocalSGDOptimizer(optim=inner[0], averager=averagers[0])
    other = TheirOptimizer(optim=inner[1], averager=averagers[1])
    assert mine.averager is averagers[0]
    assert mine.optim is inner[0]
    assert repr(mine) == repr(other)
    for number in range(10):
        step(nets[0], mine, number)
        step(nets[1], other, number)
        assert close(*nets), number
    assert averagers[0].step == averagers[1].step == 10
    saved = copy.deepcopy(mine.state_dict())
    assert saved["step"] == 10
    again = compat.PostLocalSGDOptimizer(torch.optim.SGD(nets[0].parameters(), lr=0.1), made[0](*arguments))
    again.load_state_dict(saved)
    assert again.averager.step == 10
    del saved["step"]
    with pytest.warns(UserWarning, match="step"):
        again.load_state_dict(saved)
    assert again.averager.step == 0
    averagers[0].step = averagers[1].step = 100
    step(nets[0], mine, 11)
    step(nets[1], other, 11)
    assert close(*nets)
    assert mine.state_dict()["step"] == other.state_dict()["step"] == 101


@pytest.mark.parametrize(("nproc", "hierarchical"), [(2, False), (4, True)])
def test_the_optimizer_trains_saves_and_loads_as_pytorch_s(ranks, nproc, hierarchical):
    ranks(optimizer_as_theirs, nproc, hierarchical)


def test_the_optimizer_takes_averagers_of_this_package_only():
    sgd = torch.optim.SGD(mlp().parameters(), lr=0.1)
    with pytest.raises(commhub.HookOptionError, match="of commhub_compat"):
        compat.PostLocalSGDOptimizer(sgd, "periodic")


def test_an_averager_can_be_saved_and_goes_on_where_it_was():
    averager = compat.PeriodicModelAverager(4, 8)
    averager.step = 5
    assert pickle.loads(pickle.dumps(averager)).step == 5
