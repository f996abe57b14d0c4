"""Many buckets on their way at once: every exchange gets its own results, in one order on all ranks."""

import os
import random
import time

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import commhub
from commhub import AllGather, AllReduce, Broadcast, ReduceScatter
from commhub.testing import assert_equal_across_ranks, batches, bitwise_equal, mlp, train

CAP = 1 / 1024
EVERYTHING = bool(os.environ.get("COMMHUB_EVERY_CHECK"))


class TwoRounds:
    """The mean in two collectives that depend on one another: shares are summed, then gathered."""

    def __init__(self, delay=0.0):
        self.delay = delay
        self.order = []

    def reduce(self, bucket):
        p, n = bucket.world_size, bucket.flat.numel()
        padded = torch.zeros(-(-n // p) * p, dtype=bucket.flat.dtype)
        padded[:n] = bucket.flat
        self.pause(bucket)
        mine = yield ReduceScatter(padded)
        self.pause(bucket)
        whole = yield AllGather(mine)
        bucket.flat.copy_(whole[:n])

    def pause(self, bucket):
        if self.delay:
            time.sleep(random.random() * self.delay)


class ThreeRounds(TwoRounds):
    """The same, after a first round whose result scales the payload: wrong tasks would show at once."""

    def reduce(self, bucket):
        self.pause(bucket)
        total = yield AllReduce(torch.tensor([2.0**bucket.index]), op="sum")
        scale = total.item() / bucket.world_size
        assert scale == 2.0**bucket.index
        bucket.flat.mul_(scale)
        yield from super().reduce(bucket)
        bucket.flat.div_(scale)


HOOKS = {"two": TwoRounds, "three": ThreeRounds}


def mean_at_each_step(hook, steps, cap=CAP):
    """Train twelve layers under `hook` and compare every gradient with the plain mean of the ranks' own."""
    own, model = mlp([16] * 13), DistributedDataParallel(mlp([16] * 13), bucket_cap_mb=cap)
    registration = commhub.register(model, hook)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batch, rank, p = batches(16), dist.get_rank(), dist.get_world_size()
    for step in range(steps):
        for module in (own, model):
            module.zero_grad()
            module(*batch(rank, step)).square().mean().backward()
        mean = torch.cat([q.grad.reshape(-1) for q in own.parameters()]) / p
        dist.all_reduce(mean)
        found = torch.cat([q.grad.reshape(-1) for q in model.parameters()])
        if p == 2:
            assert bitwise_equal(found, mean)
        torch.testing.assert_close(found, mean, rtol=1e-4, atol=1e-6)
        optimizer.step()
        own.load_state_dict(model.module.state_dict())
    assert_equal_across_ranks([q.detach() for q in model.parameters()])  # all steps' gradients are in them
    assert registration.step == registration.stats.steps == steps
    return len(model._get_ddp_logging_data()["rebuilt_bucket_sizes"].split(","))


def many_steps(kind, steps):
    return mean_at_each_step(HOOKS[kind](), steps)


@pytest.mark.parametrize("nproc", [2, 4])
@pytest.mark.parametrize("kind", list(HOOKS))
def test_twelve_buckets_in_many_steps_give_the_mean(ranks, kind, nproc):
    steps = 100 if EVERYTHING else {2: 30, 4: 20}[nproc]
    assert ranks(many_steps, nproc, kind, steps) == [12] * nproc


def spying(delay):
    """What this rank handed to Gloo, in order, while the others are late at random."""
    from commhub.drivers._gloo import GlooCommunicator

    launch, issued = GlooCommunicator.launch, []

    def spy(self, job):
        issued.append((job.kind.__name__, job.payload.numel(), str(job.payload.dtype)))
        return launch(self, job)

    GlooCommunicator.launch = spy
    try:
        random.seed(dist.get_rank())
        model = DistributedDataParallel(mlp([16, 8] * 6 + [16]), bucket_cap_mb=1 / 4096)
        commhub.register(model, ThreeRounds(delay if dist.get_rank() == 1 else 0.0))
        run = train(model, 6)
    finally:
        GlooCommunicator.launch = launch
    assert_equal_across_ranks(run.parameters)
    return issued


@pytest.mark.parametrize("nproc", [2, 4])
def test_ranks_issue_in_one_order_even_where_one_encodes_slowly(ranks, nproc):
    issued = ranks(spying, nproc, 0.004)
    assert len(issued[0]) > 100
    assert all(other == issued[0] for other in issued[1:])


class Alternating:
    """Kinds of exchange that differ between buckets: nothing, one round, two rounds of tuples."""

    def reduce(self, bucket):
        if bucket.index % 3 == 0:
            bucket.flat.copy_((yield AllReduce(bucket.flat)))
        elif bucket.index % 3 == 1:
            half = bucket.flat.numel() // 2
            results = yield AllReduce(bucket.flat[:half]), AllReduce(bucket.flat[half:])
            assert isinstance(results, tuple)
            bucket.flat.copy_(torch.cat(results))
        else:
            (one,) = yield (AllReduce(bucket.flat),)
            sums = yield AllGather(torch.full((3,), float(bucket.rank))), Broadcast(one, src=1)
            assert sums[0].view(-1, 3)[:, 0].tolist() == list(range(bucket.world_size))
            bucket.flat.copy_(sums[1])


def alternating():
    mean_at_each_step(Alternating(), 15)


@pytest.mark.parametrize("nproc", [2, 4])
def test_buckets_may_differ_in_their_exchanges_and_yield_tuples(ranks, nproc):
    ranks(alternating, nproc)


class InPairs:
    """The mean in two stages on communicators of its own: within pairs, then between them."""

    def prepare(self, setup):
        p = setup.world_size
        self.near = setup.partition([[r, r + 1] for r in range(0, p, 2)])
        self.far = setup.partition([range(r, p, 2) for r in range(2)])
        assert self.near.ranks == (setup.rank // 2 * 2, setup.rank // 2 * 2 + 1)

    def reduce(self, bucket):
        near = yield AllReduce(bucket.flat, group=self.near)
        bucket.flat.copy_((yield AllReduce(near, group=self.far)))


def in_pairs():
    mean_at_each_step(InPairs(), 10)
    every = [torch.full((5,), float(r)) for r in range(4)]
    assert commhub.simulate(InPairs(), [[t] for t in every]).gradients[0][0].tolist() == [1.5] * 5


def test_subgroups_of_a_partition_average_among_themselves(ranks):
    ranks(in_pairs, 4)


class Partitions:
    def __init__(self, groups):
        self.groups = groups

    def prepare(self, setup):
        self.mine = setup.partition(self.groups)

    def reduce(self, bucket):
        if self.mine is not None:
            bucket.flat.copy_((yield AllReduce(bucket.flat, group=self.mine)))


def partitions(groups):
    model = DistributedDataParallel(mlp())
    try:
        commhub.register(model, hook := Partitions(groups))
    except commhub.HookOptionError as error:
        return str(error)
    with torch.no_grad():
        model(torch.ones(1, 8))  # DDP wants a forward before anything else; gradients do not matter here
    return hook.mine and hook.mine.ranks


@pytest.mark.parametrize("groups", [[[0, 1], [1, 2]], [[0, 3]], [[-1]]], ids=str)
def test_a_partition_with_a_rank_twice_or_out_of_range_is_refused_everywhere(ranks, groups):
    assert all("at most once" in text for text in ranks(partitions, 3, groups))


def test_a_rank_outside_every_part_gets_none(ranks):
    assert ranks(partitions, 3, [[2, 0]]) == [(0, 2), None, (0, 2)]
