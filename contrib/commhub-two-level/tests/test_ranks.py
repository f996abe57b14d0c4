"""two_level on real ranks, whose hosts are named as the tests want them."""

import os
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import commhub
from commhub.testing import Branches, assert_equal_across_ranks, batches, bitwise_equal, mlp, train

EVEN, UNEVEN = "aabb", "abbb"
ONE, MANY = 25, 1 / 1024  # bucket_cap_mb
DEEP = [8] * 13  # twelve layers


def registered(hook, hosts, module=None, **ddp):
    model = DistributedDataParallel(mlp(DEEP) if module is None else module, **ddp)
    with patch.dict(os.environ, COMMHUB_HOST=hosts[dist.get_rank()]):
        return model, commhub.register(model, hook, timeout=30)


def many_layouts():
    means = {name: mean_of(g) for name, g in train(mlp(DEEP), 1).gradients[0].items()}
    told = {}
    for hosts, cap in ((EVEN, MANY), (UNEVEN, ONE), ("aaaa", ONE), ("abcd", MANY)):
        model, registration = registered("two_level(inner=allreduce)", hosts, bucket_cap_mb=cap)
        run = train(model, 2)
        assert_equal_across_ranks(run.parameters)
        for name, mean in means.items():
            torch.testing.assert_close(run.gradients[0][name].double(), mean, rtol=1e-5, atol=1e-6)
        told[hosts] = registration.stats.last.sent_bytes
    return told


def mean_of(gradient):
    total = gradient.double()
    dist.all_reduce(total)
    return total / dist.get_world_size()


def test_every_layout_of_hosts_gives_the_mean_and_equal_ranks(ranks):
    told = ranks(many_layouts, 4)
    assert told[0]["aaaa"] == told[0]["abcd"] == 1.5 * sum(p.nbytes for p in mlp(DEEP).parameters())
    assert told[0][EVEN] == told[3][EVEN] > told[0]["aaaa"]


def compressing():
    told = []
    for inner in ("powersgd_rank2(start_step=0)", "quantize_per_tensor(bits=4, stochastic_rounding=true)"):
        for hosts in (EVEN, UNEVEN):
            model, registration = registered(f"two_level(inner={inner})", hosts, mlp([64, 48, 64]), bucket_cap_mb=MANY)
            assert_equal_across_ranks(train(model, 4).parameters)
            memory = registration.state_dict()["local"]
            same = hosts[dist.get_rank()], memory
        told.append(same)
    return told


def test_compressing_hooks_leave_all_ranks_with_the_same_bits_and_a_host_s_with_the_same_memory(ranks):
    results = ranks(compressing, 4)
    for number in range(2):
        by_host = {}
        for host, memory in (result[number] for result in results):
            tables = {f"{n} {k}": t for table in memory.values() for n, kept in table.items() for k, t in kept.items()}
            other = by_host.setdefault(host, tables)
            assert tables.keys() == other.keys()
            assert all(bitwise_equal(tables[name], other[name]) for name in tables)
    assert by_host["a"].keys() == by_host["b"].keys()


def unused_on_some():
    """A branch that one rank of a host uses and the other does not: its residual moves alike on both."""
    hook = "two_level(inner=powersgd(rank=1, start_step=0))"
    model, registration = registered(hook, EVEN, Branches(32), find_unused_parameters=True)
    for step in range(3):
        (x,) = batches(32)(dist.get_rank(), step)
        model(x, both=dist.get_rank() == 1 and step > 0).square().mean().backward()
        assert_equal_across_ranks({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
        model.zero_grad()
    [tables] = registration.state_dict()["local"].values()
    return list(tables["unused.weight"].values())


def test_a_parameter_that_one_rank_of_a_host_left_out_counts_as_used_by_the_host(ranks):
    first, second, third, _ = ranks(unused_on_some, 4)
    assert first
    assert all(bitwise_equal(a, b) for a, b in zip(first, second, strict=True))
    assert any(t.any() for t in first)
    assert not any(t.any() for t in third)


def refused():
    model = DistributedDataParallel(mlp(DEEP))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with (
        patch.dict(os.environ, COMMHUB_HOST=EVEN[dist.get_rank()]),
        pytest.raises(commhub.HookOptionError, match="Name a hook that averages gradients among all ranks"),
    ):
        commhub.register(model, "two_level(inner=post_local_sgd)", optimizer=optimizer)
    assert commhub.registration(model) is None


def test_what_makes_groups_of_its_own_is_refused_at_registration(ranks):
    ranks(refused, 4)
