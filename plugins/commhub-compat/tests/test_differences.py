"""What stays different from PyTorch by decision: rows of the table in docs/migration.md that no other test holds."""

import commhub_compat as compat
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import commhub
from commhub.testing import mlp


def model_of(net=None, **options):
    return DistributedDataParallel(mlp() if net is None else net, **options)


def backward(model, value=1.0):
    model(torch.full((2, 8), value)).sum().backward()


def twice():
    model = model_of()
    for member in (compat.DDPCommHookType.ALLREDUCE, compat.DDPCommHookType.FP16_COMPRESS):
        compat.register_ddp_comm_hook(member, model)
    assert str(commhub.registration(model)) == "fp16"
    with pytest.raises(RuntimeError, match="only be called once"):
        model.register_comm_hook(None, compat.allreduce_hook)
    other = model_of()
    other.register_comm_hook(None, compat.allreduce_hook)
    assert other._get_ddp_logging_data()["comm_hook"] == "allreduce_hook"
    with pytest.raises(RuntimeError, match="only be called once"):
        other.register_comm_hook(None, compat.allreduce_hook)
    backward(other)
    assert other._get_ddp_logging_data()["comm_hook"] == "allreduce"


def of_low_rank():
    net = nn.Linear(64, 64, bias=False)
    model = model_of(net)
    model.register_comm_hook(compat.PowerSGDState(None, 2, 0, orthogonalization_epsilon=1.0), compat.powerSGD_hook)
    model(torch.ones(1, 64)).sum().backward()
    assert torch.allclose(net.weight.grad, torch.ones(64, 64), 1e-4)  # of rank 1, at rank 2


def saves_too_little():
    net = nn.Linear(4, 4, bias=False)
    model = model_of(net)
    state = compat.PowerSGDState(None, 1, 0, min_compression_rate=1000)
    model.register_comm_hook(state, compat.batched_powerSGD_hook)
    model(torch.eye(4)).sum().backward()
    assert torch.equal(net.weight.grad, torch.ones(4, 4))
    assert state.compression_stats() == (1.0, 16, 16)


def the_models_own_group():
    rank = dist.get_rank()
    pair = dist.new_subgroups(group_size=2)[0]
    net = nn.Linear(1, 1, bias=False)
    model = model_of(net, process_group=pair)
    model.register_comm_hook(None, compat.allreduce_hook)
    model(torch.full((1, 1), float(rank))).sum().backward()
    assert net.weight.grad.item() == rank // 2 * 2 + 0.5


def in_place_and_later():
    """Storage, strides, and an averager that serves one optimizer."""
    net = nn.Conv2d(2, 3, 3).to(memory_format=torch.channels_last)
    net.weight.data.fill_(dist.get_rank())
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    address, strides = net.weight.data_ptr(), net.weight.stride()
    averager = compat.PeriodicModelAverager(5)
    averager.average_parameters(net.parameters())
    assert (net.weight.data_ptr(), net.weight.stride()) == (address, strides)
    assert net.weight.unique().tolist() == [0.5]
    optimizers = [compat.PostLocalSGDOptimizer(torch.optim.SGD(mlp().parameters(), lr=0.1), averager) for _ in range(2)]
    with pytest.raises(commhub.RegistrationError, match="at work already"):
        optimizers[0].step()


def theirs_are_not_read():
    from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState

    model = model_of()
    model.register_comm_hook(PowerSGDState(None), compat.powerSGD_hook)
    with pytest.raises(commhub.HookOptionError, match="PyTorch's own is not read"):
        backward(model)


@pytest.mark.parametrize("what", [twice, of_low_rank, saves_too_little, in_place_and_later, theirs_are_not_read])
def test_what_the_guide_says_of(ranks, what):
    ranks(what, 2)


def test_a_group_of_none_is_the_model_s_own(ranks):
    ranks(the_models_own_group, 4)


def test_an_averager_may_be_made_before_the_process_group(ranks):
    assert not dist.is_initialized()
    assert compat.PeriodicModelAverager(4).step == 0


def test_errors_are_commhub_s_and_builtin_ones():
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the text is the other tests'
        compat.PeriodicModelAverager(0)
    assert isinstance(caught.value, commhub.CommhubError)
