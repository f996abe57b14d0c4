"""diloco between the replicas of a model that FSDP2 shards, against DiLoCo of its shards in double precision."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor.debug import _clear_sharding_prop_cache

import commhub
from commhub.testing import batches, bitwise_equal, mlp

LR, WIDTHS = 0.1, [8, 15, 4]  # 15 rows are cut unevenly


def built(**options):
    _clear_sharding_prop_cache()
    mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("replicate", "shard"))
    model = mlp(WIDTHS)
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh["shard"], **options)
    return mesh, fully_shard(model, mesh=mesh["shard"], **options)


def registered(mesh, model, hook):
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    group = mesh["replicate"]
    return optimizer, commhub.register(model, hook, process_group=group, optimizer=optimizer, timeout=20)


def local_step(model, optimizer, step):
    optimizer.zero_grad()
    model(*batches(8)(dist.get_rank(), step)).square().mean().backward()
    optimizer.step()


def own(model):
    return {name: p.detach().to_local().clone() for name, p in model.named_parameters() if p.to_local().numel()}


def mean64(tensor, group):
    every = [torch.empty_like(tensor, dtype=torch.float64) for _ in range(2)]
    dist.all_gather(every, tensor.double().contiguous(), group=group)
    return torch.stack(every).mean(0)


def against_the_paper(policy):
    """Local steps by FSDP alone, and the outer steps of this rank's shards written out in double precision."""
    options = {"mp_policy": policy} if policy else {}
    mesh, model = built(**options)
    _, native = built(**options)
    optimizer, registration = registered(mesh, model, "diloco(period=2)")
    plain = torch.optim.SGD(native.parameters(), lr=LR)
    group, worst = mesh["replicate"].get_group(), 0.0
    theta = {name: x.double() for name, x in own(native).items()}
    momentum = {name: torch.zeros_like(x) for name, x in theta.items()}
    for step in range(6):
        for one, its in ((model, optimizer), (native, plain)):
            local_step(one, its, step)
        if step % 2:
            with torch.no_grad():
                for name, p in native.named_parameters():
                    if name in theta:
                        delta = theta[name] - mean64(p.to_local(), group)
                        momentum[name] = 0.9 * momentum[name] + delta
                        expected = theta[name] - 0.7 * (delta + 0.9 * momentum[name])
                        found = own(model)[name]
                        # Ten roundings of float32 lie on the way, none of more than these together.
                        sizes = theta[name].abs() + delta.abs() + momentum[name].abs()
                        worst = max(worst, float(((found - expected).abs() / (10 * 2.0**-24 * sizes)).max()))
                        theta[name] = found.double()  # so that the next one's local steps are the same
                        p.to_local().copy_(found)
        elif any(not bitwise_equal(x, own(native)[name]) for name, x in own(model).items()):
            raise AssertionError(f"the local step {step} is another one than FSDP's alone")
    return worst, registration.step


@pytest.mark.parametrize("policy", [None, MixedPrecisionPolicy(torch.bfloat16)])
def test_it_is_the_paper_s_algorithm_on_every_shard(ranks, policy):
    for worst, steps in ranks(against_the_paper, 4, policy):
        assert steps == 6
        assert 0 < worst <= 1, worst


def unlike(rank):
    """One shard of one replica gets what is not finite, in the second outer step."""
    mesh, model = built()
    optimizer, registration = registered(mesh, model, "diloco(period=2)")
    for step in range(4):
        local_step(model, optimizer, step) if step != 3 else None
    before = registration.state_dict()["shared"]
    before = {name: {key: t.clone() for key, t in table.items()} for name, table in before.items()}
    optimizer.zero_grad()
    model(*batches(8)(dist.get_rank(), 3)).square().mean().backward()
    if dist.get_rank() == rank:
        next(model.parameters()).grad.to_local().fill_(float("inf"))
    optimizer.step()
    after = registration.state_dict()["shared"]
    same = all(bitwise_equal(after[name][key], before[name][key]) for name in before for key in before[name])
    return same, all(bool(x.isfinite().all()) for x in own(model).values())


@pytest.mark.parametrize("rank", [0, 3])
def test_an_outer_step_that_is_not_finite_on_one_shard_counts_on_none(ranks, rank):
    assert ranks(unlike, 4, rank) == [(True, True)] * 4


def resumed(folder, load):
    """Five steps, the last outer step after the fourth, and three more; or those from the checkpoint."""
    mesh, model = built()
    optimizer, registration = registered(mesh, model, "diloco(period=2)")
    file = folder / f"model{dist.get_rank()}"
    if load:
        with torch.no_grad():
            for p, kept in zip(model.parameters(), torch.load(file, weights_only=True), strict=True):
                p.to_local().copy_(kept)
        registration.load(folder / "hook")
    else:
        for step in range(5):
            local_step(model, optimizer, step)
        registration.save(folder / "hook")
        torch.save([p.detach().to_local().clone() for p in model.parameters()], file)
    for step in range(5, 8):
        local_step(model, optimizer, step)
    return own(model), registration.step


def test_it_goes_on_from_a_checkpoint_of_every_shard(ranks, tmp_path):
    first, second = ranks(resumed, 4, tmp_path, False), ranks(resumed, 4, tmp_path, True)
    for (expected, steps), (found, again) in zip(first, second, strict=True):
        assert steps == again == 8
        assert all(bitwise_equal(found[name], x) for name, x in expected.items())
