"""A timeline's file is a trace that Chrome and Perfetto read, and says what the figures say."""

import itertools
import json
import time

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import commhub
from commhub import AllGather, AllReduce, Network, ReduceScatter, RegistrationError
from commhub.drivers._trace import merged, write
from commhub.testing import mlp, train

NARROW, WIDTHS = 1 / 1024, [16] * 13  # twelve buckets, from the second step on
PHASES = {"ready", "encode", "waits for its turn", "on the wire", "decode"}


class TwoStages:
    """A mean in two stages."""

    def reduce(self, bucket):
        pad = -bucket.flat.numel() % bucket.world_size
        mine = yield ReduceScatter(torch.cat([bucket.flat, bucket.flat.new_zeros(pad)]))
        bucket.flat.copy_((yield AllGather(mine))[: bucket.flat.numel()])


class Each:
    """Averages parameters after every second step, and nothing of the gradients."""

    def prepare(self, setup):
        self._everyone = setup.partition([range(setup.world_size)])

    def due(self, step):
        return self._everyone if step % 2 else None

    def reduce(self, bucket):
        bucket.flat.copy_((yield AllReduce(bucket.flat)))


def checked(made, rank):
    """The slices of a trace, by track, after a look at its form."""
    assert set(made) == {"traceEvents", "displayTimeUnit"}
    tracks, slices = {}, {}
    for event in made["traceEvents"]:
        assert event["pid"] == rank
        assert isinstance(event["tid"], int)
        assert event["ph"] in {"M", "X", "i"}
        if event["ph"] == "M":
            if event["name"] == "thread_name":
                tracks[event["tid"]] = event["args"]["name"]
            continue
        assert event["ts"] > 1.6e15  # microseconds since 1970
        assert event["name"]
        if event["ph"] == "X":
            assert event["dur"] >= 0
            slices.setdefault(tracks[event["tid"]], []).append(event)
    for track in slices.values():
        nested(track)
    return slices


def nested(slices):
    """Those of one track lie within one another or apart, to a microsecond: a float of this size is hardly finer."""
    above = []
    for event in sorted(slices, key=lambda event: (event["ts"], -event["dur"])):
        start, end = event["ts"], event["ts"] + event["dur"]
        while above and start >= above[-1] - 1:
            above.pop()
        assert not above or end <= above[-1] + 1
        above.append(end)


def written(folder):
    rank = dist.get_rank()
    model = DistributedDataParallel(mlp(WIDTHS), bucket_cap_mb=NARROW)
    registration = commhub.register(model, TwoStages())
    registration.emulate(Network(latency=0.01))
    began = time.time()
    train(model, 3)
    steps = registration.timeline(str(folder / "{rank}.json"))
    ended = time.time()
    made = json.loads((folder / f"{rank}.json").read_text())
    slices = checked(made, rank)
    assert sorted(slices) == sorted(["training", "word 0", *(f"bucket {i}" for i in range(12))])
    every = [event for track in slices.values() for event in track]
    assert all(began <= event["ts"] / 1e6 + 1e-3 for event in every)
    assert all((event["ts"] + event["dur"]) / 1e6 <= ended + 1e-3 for event in every)
    last = registration.stats.last
    of_last = [e for name, track in slices.items() if name[:6] == "bucket" for e in track if e["args"]["step"] == 2]
    for phase, seconds in (("encode", last.encode_seconds), ("decode", last.decode_seconds)):
        told = sum(event["dur"] for event in of_last if event["name"] == phase) / 1e6
        assert told == pytest.approx(seconds, abs=1e-6 * len(of_last))
    wholes = [event for event in of_last if "hook" in event["args"]]
    assert sum(event["args"]["sent_bytes"] for event in wholes) == last.sent_bytes
    assert sum(event["args"]["logical_bytes"] for event in wholes) == last.logical_bytes
    names = dict(model.module.named_parameters())
    assert sorted(name for event in wholes for name in event["args"]["parameters"]) == sorted(names)
    assert {event["name"] for event in of_last if event not in wholes} == PHASES
    on_the_wire = [event for event in of_last if event["name"] == "on the wire"]
    assert len(on_the_wire) == 24
    assert all(event["dur"] >= 10_000 for event in on_the_wire)
    overlaps = itertools.pairwise(sorted(on_the_wire, key=lambda event: event["ts"]))
    assert any(one["ts"] + one["dur"] > other["ts"] for one, other in overlaps)
    blocked = sum(e["dur"] for e in slices["training"] if e["name"] == "blocked" and e["args"]["step"] == 2) / 1e6
    assert last.exposed_seconds <= blocked + 1e-5
    assert {event["name"] for event in slices["training"]} == {"compute", "blocked"}
    assert len(steps) == 3
    return made, [step.began for step in steps]


def test_the_file_is_a_trace_that_agrees_with_the_figures(ranks, tmp_path):
    one, other = ranks(written, 2, tmp_path)
    whole = merged([one[0], other[0]])
    write(tmp_path / "all.json", whole)
    read = json.loads((tmp_path / "all.json").read_text())
    assert {event["pid"] for event in read["traceEvents"]} == {0, 1}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.json", "1.json", "all.json"]  # no draft is left


def names_of(registration, folder):
    registration.timeline(folder / f"{dist.get_rank()}.json")
    slices = checked(json.loads((folder / f"{dist.get_rank()}.json").read_text()), dist.get_rank())
    return {
        track: {event["args"]["hook"] for event in events if "hook" in event["args"]}
        for track, events in slices.items()
        if track != "training" and not track.startswith("word")
    }


def of_each_kind(folder):
    told = []
    model = DistributedDataParallel(mlp())
    registration = commhub.register(model, "allreduce")
    assert registration.timeline() == ()
    assert names_of(registration, folder) == {}
    train(model, 1)
    registration.swap("fp16")
    registration.schedule({2: "bf16"})
    train(model, 2)
    told.append(names_of(registration, folder))
    manual = commhub.manual(mlp(), Each())
    for _ in range(2):
        manual.average()
    told.append(names_of(manual, folder))
    return told


def test_swaps_schedules_and_averages_are_shown(ranks, tmp_path):
    wanted = [{"bucket 0": {"allreduce", "fp16", "bf16"}}, {"average 0": {"Each"}}]
    assert ranks(of_each_kind, 2, tmp_path) == [wanted] * 2


class Fails:
    def reduce(self, bucket):
        if bucket.step == 1:
            raise ValueError("planned")
        bucket.flat.copy_((yield AllReduce(bucket.flat)))


def of_a_failure(folder):
    model = DistributedDataParallel(mlp())
    registration = commhub.register(model, Fails(), timeout=20)
    train(model, 1)
    with pytest.raises(commhub.HookError):
        train(model, 1)
    names_of(registration, folder)
    registration.swap("fp16")
    train(model, 1)
    names_of(registration, folder)
    return [step.step for step in registration.timeline()]


def test_a_step_that_failed_is_shown_as_far_as_it_went(ranks, tmp_path):
    assert ranks(of_a_failure, 2, tmp_path) == [[0, 1, 1]] * 2


def refused(folder):
    model = DistributedDataParallel(mlp())
    registration = commhub.register(model, "allreduce")
    train(model, 1)
    told = []
    for path in (folder / "missing" / "trace.json", folder, "", 3, b"trace.json", "a\0b", folder / ("x" * 300)):
        with pytest.raises(RegistrationError) as error:
            registration.timeline(path)
        told.append(str(error.value))
    assert list(folder.iterdir()) == []
    registration.remove()
    with pytest.raises(RegistrationError, match="removed"):
        registration.timeline()
    return told


def test_where_nothing_can_be_written_there_is_one_clear_error(ranks, tmp_path):
    (told,) = ranks(refused, 1, tmp_path)
    assert "there is no folder" in told[0]
    assert "Make it first" in told[0]
    assert len(set(told)) == len(told)
