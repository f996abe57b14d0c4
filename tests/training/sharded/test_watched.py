"""Sharded models are watched like others: their timeline and their reports."""

import json

import torch.distributed as dist

from .sharding import Loop, inside, mesh, sharded


def watched(sort, folder):
    make = {"replicas": lambda: sharded(mesh(), "fp16"), "shards": lambda: inside("fp16")}
    model, registration = make[sort]()
    told = []
    registration.report(2, lambda figures, step: told.append((step, figures["commhub/compression"])))
    Loop(model).run(4)
    steps = registration.timeline(folder / "{rank}.json")
    names = [name for bucket in steps[-1].buckets if bucket.purpose == "gradients" for name in bucket.names]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    sent = sum(s.sent_bytes for b in steps[-1].buckets if b.purpose == "gradients" for s in b.stages)
    assert sent == registration.stats.last.sent_bytes > 0
    kinds = {kind for bucket in steps[-1].buckets if bucket.purpose == "gradients" for kind in bucket.stages[0].kinds}
    made = json.loads((folder / f"{dist.get_rank()}.json").read_text())
    assert {event["pid"] for event in made["traceEvents"]} == {dist.get_rank()}
    return [step.step for step in steps], told, kinds


def test_replicas_of_shards_are_watched_by_every_rank(ranks, tmp_path):
    expected = ([0, 1, 2, 3], [(2, 2), (4, 2)], {"AllReduce"})
    assert ranks(watched, 4, "replicas", tmp_path) == [expected] * 4
    assert len(list(tmp_path.iterdir())) == 4


def test_shards_are_watched_by_every_rank(ranks, tmp_path):
    expected = ([0, 1, 2, 3], [(2, 2), (4, 2)], {"ReduceScatter"})
    assert ranks(watched, 2, "shards", tmp_path) == [expected] * 2
