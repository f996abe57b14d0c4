"""Traces of torch.profiler show what each hook does with which bucket, in the thread that does it."""

import json
import time

import torch
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile

import commhub
from commhub import AllGather, Network, ReduceScatter
from commhub.drivers import _ranges
from commhub.drivers._records import BucketRecord
from commhub.testing import mlp, train

NARROW, WIDTHS = 1 / 1024, [16] * 13  # twelve buckets, from the second step on
SLEEP = 0.03
EVERY_THREAD = torch.profiler._ExperimentalConfig(profile_all_threads=True)


class Sleepy:
    """A mean in two stages. Of bucket 3 each piece of work takes a while, another one each."""

    def reduce(self, bucket):
        def work(factor):
            if bucket.index == 3:
                time.sleep(factor * SLEEP)

        pad = -bucket.flat.numel() % bucket.world_size
        work(1)
        mine = yield ReduceScatter(torch.cat([bucket.flat, bucket.flat.new_zeros(pad)]))
        work(2)
        whole = yield AllGather(mine)
        work(3)
        bucket.flat.copy_(whole[: bucket.flat.numel()])


def traced(path, config):
    model = DistributedDataParallel(mlp(WIDTHS), bucket_cap_mb=NARROW)
    registration = commhub.register(model, Sleepy())
    registration.emulate(Network(latency=0.002))
    train(model, 2)
    with profile(activities=[ProfilerActivity.CPU], experimental_config=config) as trace:
        train(model, 1)
    trace.export_chrome_trace(str(path / f"{torch.distributed.get_rank()}.json"))
    events = json.loads((path / f"{torch.distributed.get_rank()}.json").read_text())["traceEvents"]
    backward = next(e["tid"] for e in events if e.get("name", "").startswith("autograd::engine"))
    return [e for e in events if e.get("ph") == "X"], backward


def phases(path):
    events, training = traced(path, EVERY_THREAD)
    ranges = [event for event in events if event["name"].startswith("commhub::Sleepy::bucket")]
    pieces = {}
    for event in sorted(ranges, key=lambda event: event["ts"]):
        _, _, bucket, phase = event["name"].split("::")
        pieces.setdefault(bucket, []).append((phase, event["dur"] / 1e6))
    thread = {event["tid"] for event in ranges}
    assert len(thread) == 1  # the communication thread
    assert training not in thread
    worked = [e for e in events if e["name"] == "aten::cat" and e["tid"] in thread]
    encodes = [e for e in ranges if e["name"].endswith("encode")]
    assert len(worked) >= len(pieces)
    for work in worked:  # what the hook does lies within its range
        assert any(e["ts"] <= work["ts"] and work["ts"] + work["dur"] <= e["ts"] + e["dur"] for e in encodes)
    ends = 0.0
    for event in sorted(ranges, key=lambda event: event["ts"]):  # the thread does one thing at a time
        assert event["ts"] >= ends
        ends = event["ts"] + event["dur"]
    assert any(e["name"].startswith("commhub::Sleepy::word::") for e in events)
    blocked = [e for e in events if e["name"] == "commhub::Sleepy::blocked"]
    assert {e["tid"] for e in blocked} == {training}
    return pieces


def test_a_range_per_hook_bucket_and_phase_in_the_communication_thread(ranks, tmp_path):
    for pieces in ranks(phases, 2, tmp_path):
        assert sorted(pieces) == sorted(f"bucket{i}" for i in range(12))
        for bucket, found in pieces.items():
            worked = [(phase, seconds) for phase, seconds in found if phase != "wait"]
            assert [phase for phase, _ in worked] == ["encode", "encode", "decode"]
            if bucket == "bucket3":
                for factor, (_, seconds) in zip((1, 2, 3), worked, strict=True):
                    assert seconds >= factor * SLEEP
        assert "wait" in {phase for found in pieces.values() for phase, _ in found}


def plainly(path):
    events, training = traced(path, None)
    return {(event["name"], event["tid"] == training) for event in events if event["name"].startswith("commhub::")}


def test_a_plain_profile_sees_its_own_thread_alone(ranks, tmp_path):
    """It shows how long training stands still; this PyTorch offers other threads no way into it."""
    assert ranks(plainly, 2, tmp_path) == [{("commhub::Sleepy::blocked", True)}] * 2


def test_nothing_is_named_while_no_profiler_is_on():
    record = BucketRecord("foo", 0, "gradients", 0.0)
    assert _ranges.of(record, "encode") is _ranges.of(None, "wait") is _ranges.blocked("foo")
    with profile(activities=[ProfilerActivity.CPU]):
        assert _ranges.of(record, "encode") is not _ranges.of(None, "wait")
