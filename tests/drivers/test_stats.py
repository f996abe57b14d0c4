"""The figures: bytes follow the formulas, whoever sends; an emulated network is never quicker than it should be."""

import time

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import commhub
from commhub import AllGather, AllReduce, AllToAll, Broadcast, Network, ReduceScatter
from commhub.testing import Branches, EveryKind, mlp, train

FORMULAS = {  # bytes that one rank sends for a payload of n bytes among p ranks
    AllReduce: lambda n, p: 2 * (p - 1) / p * n,
    ReduceScatter: lambda n, p: (p - 1) / p * n,
    AllToAll: lambda n, p: (p - 1) / p * n,
    Broadcast: lambda n, p: (p - 1) / p * n,
    AllGather: lambda n, p: (p - 1) * n,
}


class Sends:
    """Asks for some collectives and leaves the gradient alone."""

    def __init__(self, *asked):
        self.asked = asked

    def reduce(self, bucket):
        for kind, numel, dtype, options in self.asked:
            yield kind(torch.zeros(numel, dtype=dtype), **options)


def one_parameter(numel=8, **ddp):
    module = nn.Module()
    module.weight = nn.Parameter(torch.zeros(numel))
    module.forward = lambda: module.weight.sum()
    return DistributedDataParallel(module, **ddp)


def sent(asked, **options):
    model = one_parameter()
    registration = commhub.register(model, Sends(*asked), **options)
    model().backward()
    return registration.stats.sent_bytes


def each_kind():
    p = dist.get_world_size()
    for kind, formula in FORMULAS.items():
        op = {"op": "sum"} if kind in (AllReduce, ReduceScatter) else {}
        for numel, dtype in [
            (4 * p, torch.float32),
            (p, torch.float64),
            (3 * p, torch.uint8),
            (p, torch.complex64),
            (0, torch.float32),
        ]:
            size = numel * dtype.itemsize
            assert sent([(kind, numel, dtype, op)]) == formula(size, p), (kind, dtype)
        wired = formula(4 * p * 2, p)  # two bytes for each element on the wire
        assert sent([(kind, 4 * p, torch.float32, {"wire": torch.bfloat16})]) == wired
        assert sent([(kind, 4 * p, torch.float32, {})], wire="fp16") == wired
    two = sent([(AllReduce, 8, torch.float32, {}), (AllGather, 5, torch.uint8, {})])
    assert two == FORMULAS[AllReduce](32, p) + FORMULAS[AllGather](5, p)


@pytest.mark.parametrize("nproc", [1, 2, 4])
def test_each_collective_sends_what_its_formula_says(ranks, nproc):
    ranks(each_kind, nproc)


class InPair:
    def prepare(self, setup):
        self.pair = setup.partition([[0, 1]])

    def reduce(self, bucket):
        if self.pair is not None:
            yield AllReduce(torch.zeros(6), group=self.pair)


def in_a_subgroup():
    model = one_parameter()
    registration = commhub.register(model, InPair())
    model().backward()
    return registration.stats.sent_bytes


def test_a_subgroup_counts_its_own_ranks_and_only_on_them(ranks):
    assert ranks(in_a_subgroup, 3) == [24.0, 24.0, 0.0]


def compressed(hook, cap):
    p = dist.get_world_size()
    model = DistributedDataParallel(mlp([16] * 4), bucket_cap_mb=cap)
    size = 4 * sum(q.numel() for q in model.parameters())
    registration = commhub.register(model, hook)
    assert (registration.stats.steps, registration.stats.sent_bytes) == (0, 0)
    assert registration.stats.compression == 1
    train(model, 3)
    stats = registration.stats
    assert stats.steps == registration.step == 3
    assert stats.logical_bytes == 3 * stats.last.logical_bytes == 3 * FORMULAS[AllReduce](size, p)
    assert stats.sent_bytes == 3 * stats.last.sent_bytes
    assert stats.last.compression == stats.compression
    for one in (stats, stats.last):
        assert one.encode_seconds >= 0
        assert one.wait_seconds >= 0
        assert one.decode_seconds >= 0
    assert stats.encode_seconds >= stats.last.encode_seconds
    return stats.compression


@pytest.mark.parametrize("cap", [25, 1 / 1024], ids=["one bucket", "many buckets"])
@pytest.mark.parametrize("nproc", [1, 2, 4])
def test_compression_is_logical_over_sent_bytes_and_1_for_a_single_rank(ranks, nproc, cap):
    for hook, compression in (("allreduce", 1), ("fp16", 2), ("bf16", 2), ("allreduce(wire=bf16)", 2)):
        wanted = 1 if nproc == 1 else compression
        assert ranks(compressed, nproc, hook, cap) == [wanted] * nproc


def other_dtypes():
    model = DistributedDataParallel(EveryKind())
    registration = commhub.register(model, "allreduce")
    train(model, 2, batch=EveryKind.batch)
    stats = registration.stats
    assert 0 < stats.logical_bytes < float("inf")
    return stats.steps


def test_sparse_and_mixed_models_are_counted_too(ranks):
    assert ranks(other_dtypes, 2) == [2, 2]


def over_swaps():
    model = DistributedDataParallel(mlp([16, 16]))
    size = 4 * sum(q.numel() for q in model.parameters())
    registration = commhub.register(model, "allreduce")
    train(model, 2)
    registration.swap("fp16")
    assert registration.stats.steps == 2
    train(model, 1)
    assert registration.stats.last.sent_bytes == size / 2
    assert registration.stats.sent_bytes == 2.5 * size
    assert registration.stats.steps == 3
    with model.no_sync():
        train(model, 1)
    assert registration.stats.steps == 3
    fresh = commhub.register(model, "fp16")
    assert (fresh.stats.steps, fresh.stats.sent_bytes) == (0, 0)


def test_figures_go_on_over_a_swap_and_start_afresh_with_a_registration(ranks):
    ranks(over_swaps, 2)


def unused():
    model = DistributedDataParallel(Branches(), find_unused_parameters=True)
    registration = commhub.register(model, "fp16")
    train(model, 2)
    return registration.stats.compression


def test_unused_parameters_travel_in_their_bucket_and_count(ranks):
    assert ranks(unused, 2) == [2, 2]


# An emulated network.


def emulated(hook, cap, network):
    model = DistributedDataParallel(mlp([64] * 4), bucket_cap_mb=cap)
    registration = commhub.register(model, hook)
    registration.emulate(network)
    train(model, 1)
    start = time.monotonic()
    train(model, 3)
    seconds = time.monotonic() - start
    least = network.seconds(registration.stats.last.sent_bytes)
    assert seconds >= 3 * least
    assert registration.stats.last.wait_seconds > 0
    registration.swap("fp16")  # the network stays
    start = time.monotonic()
    train(model, 1)
    assert time.monotonic() - start >= network.seconds(registration.stats.last.sent_bytes)
    registration.emulate(None)
    train(model, 1)
    return least


@pytest.mark.parametrize("cap", [25, 1 / 64], ids=["one bucket", "many buckets"])
def test_a_step_takes_at_least_its_bytes_over_the_bandwidth_and_the_latency(ranks, cap):
    for network in (Network(bandwidth=4e6), Network(latency=0.03), Network(bandwidth=8e6, latency=0.02)):
        assert all(least > 0.015 for least in ranks(emulated, 2, "allreduce", cap, network))


def dependent_rounds():
    """Three rounds that wait for one another cost three latencies."""
    model = one_parameter()
    registration = commhub.register(model, Sends(*[(AllReduce, 4, torch.float32, {})] * 3))
    registration.emulate(Network(latency=0.02))
    model().backward()
    start = time.monotonic()
    model().backward()
    return time.monotonic() - start


def test_rounds_that_depend_on_one_another_pay_the_latency_each(ranks):
    assert all(seconds >= 0.06 for seconds in ranks(dependent_rounds, 2))


def alone():
    model = one_parameter()
    registration = commhub.register(model, "allreduce")
    registration.emulate(Network(bandwidth=1.0, latency=1000.0))
    model().backward()
    return registration.step


def test_a_single_rank_waits_for_no_network(ranks):
    assert ranks(alone, 1) == [1]


def test_the_simulator_predicts_time_and_bytes_of_a_network():
    gradients = [[torch.zeros(1000), torch.zeros(500)] for _ in range(4)]
    network = Network(bandwidth=8000.0, latency=0.5)
    for buckets in (1, 2):
        result = commhub.simulate("fp16", gradients, steps=2, buckets=buckets, network=network)
        assert result.sent_bytes == (2 * FORMULAS[AllReduce](3000, 4),) * 4
        assert result.logical_bytes == 2 * FORMULAS[AllReduce](6000, 4)
        assert result.compression == 2
        assert result.seconds == pytest.approx(2 * (buckets * 0.5 + FORMULAS[AllReduce](3000, 4) / 1000))
    assert commhub.simulate("fp16", gradients[:1]).compression == 1


def test_a_network_is_read_from_text_and_refuses_nonsense():
    assert Network.parse("100mbit", "1ms") == Network(bandwidth=1e8, latency=1e-3)
    assert Network.parse("1.5gbit").seconds(1.5e9) == 8.0
    assert Network.parse(latency="50us").seconds(1e12) == pytest.approx(5e-5)
    for bad in (lambda: Network.parse("fast"), lambda: Network.parse("0mbit"), lambda: Network.parse("1mbit", "-1ms")):
        with pytest.raises(ValueError, match="not understood"):
            bad()
    for bad in ({"bandwidth": 0.0}, {"bandwidth": float("inf")}, {"latency": -1.0}):
        with pytest.raises(ValueError, match="give"):
            Network(**bad)
