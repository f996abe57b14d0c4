"""The record of the last steps: times in their order, sizes, and the figures that are made of it."""

import gc
import itertools
import types

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import commhub
from commhub import AllGather, AllReduce, Network, ReduceScatter
from commhub.drivers._timeline import KEPT, Recorder, Round, Timeline
from commhub.testing import mlp, train

NARROW, WIDTHS = 1 / 1024, [16] * 13  # twelve buckets, from the second step on


class TwoStages:
    """A mean in two stages, the first of two collectives."""

    def reduce(self, bucket):
        pad = -bucket.flat.numel() % bucket.world_size
        whole = torch.cat([bucket.flat, bucket.flat.new_zeros(pad)])
        mine, _ = yield ReduceScatter(whole), AllGather(torch.zeros(3))
        bucket.flat.copy_((yield AllGather(mine))[: bucket.flat.numel()])


class Each:
    """Averages parameters after every second step, and nothing of the gradients."""

    def prepare(self, setup):
        self._everyone = setup.partition([range(setup.world_size)])

    def due(self, step):
        return self._everyone if step % 2 else None

    def reduce(self, bucket):
        bucket.flat.copy_((yield AllReduce(bucket.flat)))


def in_order(*times):
    assert None not in times
    assert list(times) == sorted(times), times


def total(intervals):
    return pytest.approx(sum(end - start for start, end in intervals), abs=1e-9)


def of_two_stages(cap):
    net = mlp(WIDTHS)
    model = DistributedDataParallel(net, bucket_cap_mb=cap)
    registration = commhub.register(model, TwoStages())
    train(model, 3)
    steps = registration.timeline()
    assert [step.step for step in steps] == [0, 1, 2]
    for step in steps:
        buckets = [bucket for bucket in step.buckets if bucket.purpose == "gradients"]
        assert [bucket.index for bucket in buckets] == list(range(len(buckets)))
        assert sorted(name for bucket in buckets for name in bucket.names) == sorted(dict(net.named_parameters()))
        in_order(step.began, *(bucket.ready for bucket in buckets))
        for bucket in buckets:
            first, second = bucket.stages
            assert (first.kinds, second.kinds) == (("ReduceScatter", "AllGather"), ("AllGather",))
            in_order(
                *(step.began, bucket.ready),
                *(*first.encode, first.issued, first.landed),
                *(*second.encode, second.issued, second.landed),
                *(*bucket.decode, bucket.complete, step.ended),
            )
            assert bucket.hook == "TwoStages"
            assert not bucket.enqueued
        issued = [(bucket.index + 2 * j, stage.issued) for bucket in buckets for j, stage in enumerate(bucket.stages)]
        in_order(*(at for _, at in sorted(issued)))  # the order that all ranks keep
        assert any(bucket.purpose == "word" for bucket in step.buckets) == (dist.get_world_size() > 1)
        in_order(*(at for interval in step.blocked for at in interval))
        assert step.blocked
        assert step.ended >= step.blocked[-1][1]
    for one, next_one in itertools.pairwise(steps):
        assert one.ended <= next_one.began
    last, stats = steps[-1], registration.stats.last
    buckets = [bucket for bucket in last.buckets if bucket.purpose == "gradients"]
    stages = [stage for bucket in buckets for stage in bucket.stages]
    assert stats.encode_seconds == total([stage.encode for stage in stages])
    assert stats.decode_seconds == total([bucket.decode for bucket in buckets])
    assert 0 <= stats.exposed_seconds <= sum(end - start for start, end in last.blocked) + 1e-9
    assert stats.sent_bytes == sum(stage.sent_bytes for stage in stages)
    assert stats.logical_bytes == sum(bucket.logical_bytes for bucket in buckets)
    elements = [sum(dict(net.named_parameters())[name].numel() for name in bucket.names) for bucket in buckets]
    p = dist.get_world_size()
    assert [bucket.stages[0].payload_bytes for bucket in buckets] == [4 * (n + -n % p) + 12 for n in elements]
    return len(buckets)


@pytest.mark.parametrize("nproc", [1, 2, 3, 4])
@pytest.mark.parametrize(("cap", "count"), [(25, 1), (NARROW, 12)], ids=["one bucket", "twelve"])
def test_each_bucket_is_recorded_from_ready_to_complete(ranks, nproc, cap, count):
    assert ranks(of_two_stages, nproc, cap) == [count] * nproc


def over_a_slow_network():
    model = DistributedDataParallel(mlp(WIDTHS), bucket_cap_mb=NARROW)
    registration = commhub.register(model, "fp16")
    registration.emulate(Network(latency=0.03))
    train(model, 2)
    step = registration.timeline()[-1]
    buckets = [bucket for bucket in step.buckets if bucket.purpose == "gradients"]
    on_the_way = [bucket.stages[0].landed - bucket.stages[0].issued for bucket in buckets]
    together = sum(end - start for start, end in step.waits)
    assert 0 < registration.stats.last.exposed["wait"] <= sum(end - start for start, end in step.blocked)
    return min(on_the_way), together, len(step.waits)


def test_a_collective_is_on_the_way_as_long_as_the_network_takes(ranks):
    for least, together, waits in ranks(over_a_slow_network, 2):
        assert least >= 0.03
        assert together >= 0.03
        assert waits <= 60  # looks at Gloo one after another are one wait


def for_long():
    model = DistributedDataParallel(mlp(WIDTHS), bucket_cap_mb=NARROW)
    registration = commhub.register(model, "fp16")
    train(model, KEPT)
    registration.swap("allreduce")
    train(model, 4)
    steps = registration.timeline()
    return [step.step for step in steps], [step.buckets[0].hook for step in steps]


def test_the_last_steps_are_kept_whatever_hook_ran(ranks):
    numbers = list(range(4, KEPT + 4))
    assert ranks(for_long, 2) == [(numbers, ["fp16"] * (KEPT - 4) + ["allreduce"] * 4)] * 2


def of_averages():
    module = mlp()
    registration = commhub.manual(module, Each())
    for _ in range(4):
        registration.average()
    told = []
    for step in registration.timeline():
        told.append((step.step, [bucket.stages[0].kinds for bucket in step.buckets if bucket.purpose == "parameters"]))
    return told


def test_averages_belong_to_the_step_that_they_follow(ranks):
    once = [("AllReduce",)]
    assert ranks(of_averages, 2) == [[(0, []), (1, once), (2, []), (3, once)]] * 2


def reached_from(root):
    """All objects that it leads to, but what every process has."""
    seen, ahead = {}, [root]
    while ahead:
        one = ahead.pop()
        if id(one) in seen or isinstance(one, type | types.ModuleType | types.FunctionType):
            continue
        seen[id(one)] = one
        ahead += gc.get_referents(one)
    return seen.values()


def of_what_it_holds():
    model = DistributedDataParallel(mlp())
    registration = commhub.register(model, "powersgd_rank2(start_step=1)")
    train(model, 3)
    held = reached_from(registration.timeline())
    assert any("weight" in str(one) for one in held if isinstance(one, str))  # it does look
    return [type(one).__name__ for one in held if isinstance(one, torch.Tensor | nn.Module) or "Task" in str(type(one))]


def test_no_tensor_task_or_model_hangs_on_it(ranks):
    assert ranks(of_what_it_holds, 2) == [[], []]


class Bare:
    def __init__(self, index=0):
        self.index, self.spans = index, ()


def test_the_exposed_part_of_a_phase_is_what_training_stood_still_for():
    part = Round()
    recorder = Recorder("foo")
    record = recorder.open(Bare(), "gradients")
    record.decode = (10.0, 14.0)
    part.buckets.append(record)
    part.waits += [(0.0, 2.0), (5.0, 9.0)]
    part.blocked += [(1.0, 3.0), (6.0, 7.0), (8.0, 12.0)]
    figures = part.figures()
    assert (figures.encode_seconds, figures.wait_seconds, figures.decode_seconds) == (0.0, 6.0, 4.0)
    assert figures.exposed == {"encode": 0.0, "wait": 1.0 + 1.0 + 1.0, "decode": 2.0}


def test_waits_are_one_until_there_is_something_to_do():
    recorder = Recorder()
    recorder.waited(1.0, 2.0)
    recorder.waited(3.0, 4.0)
    recorder.works()
    recorder.waited(5.0, 6.0)
    assert recorder.take().waits == [(1.0, 4.0), (5.0, 6.0)]
    recorder.waited(7.0, 8.0)
    assert recorder.take().waits == [(7.0, 8.0)]


def test_what_comes_before_the_first_step_belongs_to_none():
    timeline, part = Timeline(), Round()
    part.buckets.append(Recorder().open(Bare(), "word"))
    timeline.add(part)
    assert timeline.steps == ()
    timeline.begin(7)
    timeline.add(part)
    assert [(step.step, len(step.buckets)) for step in timeline.steps] == [(7, 1)]
