"""What neither call can serve is refused by both with the reason, and no advice is given that cannot work."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed._composable.replicate_with_fsdp import replicate as replicate_with_fsdp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import commhub
from commhub.testing import assert_equal_across_ranks


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8, bias=False), nn.ReLU(), nn.Linear(8, 8, bias=False))


def told(call, model, **options):
    with pytest.raises(commhub.RegistrationError) as error:
        call(model, "allreduce", timeout=20, **options)
    return str(error.value)


def fsdp1():
    model = FullyShardedDataParallel(net(), device_id=torch.device("cpu"))
    part = nn.Sequential(net(), FullyShardedDataParallel(net(), device_id=torch.device("cpu")))
    for one in (model, part, DistributedDataParallel(part)):
        for call in (commhub.register, commhub.manual):
            text = told(call, one)
            assert text.startswith("FullyShardedDataParallel"), text
            assert "fully_shard" in text
            assert 'process_group=mesh["replicate"]' in text
            assert "commhub.manual" not in text
    with pytest.raises(commhub.RegistrationError, match="fully_shard") as asked:
        commhub.registration(model)
    assert "commhub.manual" not in str(asked.value)
    one_rank_alone = model if dist.get_rank() else net()
    assert "FullySharded" in told(commhub.manual, one_rank_alone)


def test_fsdp1_is_refused_with_the_way_out(ranks):
    ranks(fsdp1, 2)


def native():
    mesh = init_device_mesh("cpu", (2,))
    model = replicate_with_fsdp(net(), mesh=mesh)
    for one in (model, nn.Sequential(model)):
        for call in (commhub.register, commhub.manual):
            text = told(call, one)
            assert "replicate_with_fsdp" in text
            assert "all-reduce" in text
            assert "torch.distributed._composable.replicate(" in text


def test_replicate_with_fsdp_reduces_natively_and_is_refused(ranks):
    ranks(native, 2)


def dtensors():
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "tp"))
    for sharded in (fully_shard(net(), mesh=mesh["tp"]), nn.Sequential(net(), fully_shard(net(), mesh=mesh["tp"]))):
        text = told(commhub.manual, sharded)
        assert "fully_shard" in text
        assert 'commhub.register(model, hook, process_group=mesh["replicate"])' in text
    parallel = parallelize_module(net(), mesh["tp"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
    for call in (commhub.register, commhub.manual):
        text = told(call, parallel)
        assert "'0.weight' is a DTensor" in text
        assert "device_mesh=" in text
    late = DistributedDataParallel(net(), process_group=mesh["replicate"].get_group())
    parallelize_module(late.module, mesh["tp"], {"0": ColwiseParallel()})
    assert "'0.weight' is a DTensor" in told(commhub.register, late)
    unsynced = parallelize_module(net(), mesh["tp"], {"0": ColwiseParallel()})
    unsynced = DistributedDataParallel(unsynced, process_group=mesh["replicate"].get_group(), init_sync=False)
    assert "device_mesh=" in told(commhub.register, unsynced)


def test_sharded_parameters_are_refused_with_what_serves_them(ranks):
    ranks(dtensors, 4)


def of_tensor_parallelism():
    """The model that the advice is to make: its local parameters, which the optimizer gets before the first forward."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "tp"))
    parallel = parallelize_module(net(), mesh["tp"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
    model = DistributedDataParallel(parallel, device_mesh=mesh["replicate"])
    return model, list(model.parameters()), mesh["replicate"]


def advised():
    found = []
    for hook in (None, "allreduce", "powersgd_rank2(start_step=0, min_compression_rate=1)"):
        model, parameters, replicas = of_tensor_parallelism()
        registration = None if hook is None else commhub.register(model, hook, timeout=20)
        seed = 1 + replicas.get_local_rank()
        optimizer = torch.optim.SGD(parameters, lr=0.1)
        for number in range(3):
            optimizer.zero_grad()
            inputs = torch.randn(4, 8, generator=torch.Generator().manual_seed(10 * number + seed))
            model(inputs).square().sum().backward()
            optimizer.step()
        assert registration is None or registration.step == 3
        assert_equal_across_ranks([p.data for p in parameters], group=replicas.get_group())
        found.append([p.detach().clone() for p in parameters])
    plain, exact, compressed = found
    assert all(torch.equal(a, b) for a, b in zip(plain, exact, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(plain, compressed, strict=True))


def test_tensor_parallelism_between_replicas_works_as_advised(ranks):
    ranks(advised, 4)


class Derived(DistributedDataParallel):
    """A class of a user's own."""


def strangers():
    model = net()
    text = told(commhub.register, model)
    assert "Wrap it in one, or use commhub.manual" in text
    assert "__main__" not in text
    for strange in (None, 7, [model], nn.Module, "model", torch.optim.SGD(model.parameters(), lr=0.1)):
        text = told(commhub.register, strange)
        assert "Wrap it" not in text
        assert "manual" not in text
        assert "torch.nn.parallel.DistributedDataParallel" in text
        assert "give a torch.nn.Module" in told(commhub.manual, strange)
    assert "each of them" in told(commhub.register, [model, model])
    assert "an instance" in told(commhub.register, nn.Linear)
    text = told(commhub.register, nn.DataParallel(model))
    assert "one process" in text
    assert "DistributedDataParallel(model.module)" in text
    for held in (nn.Sequential(DistributedDataParallel(net())), nn.ModuleList([DistributedDataParallel(net())] * 2)):
        text = told(commhub.manual, held)
        assert "averages by itself" in text
    derived = Derived(net())
    registration = commhub.register(derived, "allreduce", timeout=20)
    derived(torch.full((2, 8), 1.0 + dist.get_rank())).sum().backward()
    assert registration.step == 1
    assert_equal_across_ranks([p.grad for p in derived.parameters()])
    served = nn.DataParallel(net())  # it is one module like any other to who averages by hand
    registration = commhub.manual(served, "allreduce", timeout=20)
    served(torch.full((2, 8), 1.0 + dist.get_rank())).sum().backward()
    registration.average()
    assert_equal_across_ranks([p.grad for p in served.parameters()])


def test_what_is_no_model_is_told_what_to_give(ranks):
    ranks(strangers, 2)
