"""Steps of several hooks in turn: all in every round, in another order each, on the same weights, which stay."""

import os
from unittest.mock import patch

import attrs
import pytest
import torch

import commhub
from commhub import AllReduce
from commhub.bench import _attach, _race
from commhub.bench._data import Text
from commhub.bench._options import Settings
from commhub.bench._sizes import SIZES

TEXT = bytes(range(256)) * 300
HOOKS = {0: "allreduce", 1: "fp16", 3: "powersgd_rank2(start_step=0)", 4: "optimizer_overlap", -1: "noop"}


@attrs.define
class Raises:
    """Fails on rank 1 in a step; where it is `at_once`, before the first."""

    at_once: bool = False

    def prepare(self, setup):
        if self.at_once and setup.rank == 1:
            raise RuntimeError("not at all")

    def reduce(self, bucket):
        if bucket.step == 5 and bucket.rank == 1:
            raise RuntimeError("no more")
        bucket.flat.copy_((yield AllReduce(bucket.flat)))


def raced(hooks, flags, bad):
    """Every event, and the weights of all models before and after."""
    events, weights, own = [], [], _race.wrap
    attach = _race.attach

    def wrap(*arguments, **options):
        made = own(*arguments, **options)
        weights.append((made.bare, [parameter.detach().clone() for parameter in made.bare.parameters()]))
        return made

    def attach_own(wrapped, hook, **options):
        if hook not in bad:
            return attach(wrapped, hook, **options)
        return _attach._Ours(commhub.register(wrapped.model, bad[hook]))

    settings = Settings(hooks=("allreduce",), steps=0, batch=1, seed=3, repeats=5, **flags)
    text = Text.cut(TEXT, context=SIZES["tiny"].context)
    with patch.object(_race, "wrap", wrap), patch.object(_race, "attach", attach_own):
        _race.race(settings, hooks, text, torch.device("cpu"), events.append)
    kept = all(torch.equal(p, q) for model, before in weights for p, q in zip(model.parameters(), before, strict=True))
    memory = {tuple(p.data_ptr() for p in model.parameters()) for model, _ in weights}
    return events, kept, len(memory)


@pytest.mark.parametrize("p", [1, 2, 3] if os.environ.get("COMMHUB_EVERY_CHECK") else [2])
def test_every_hook_takes_a_step_in_every_round_in_another_order(ranks, p):
    answers = ranks(raced, p, HOOKS, {}, {})
    events, kept, memories = answers[0]
    assert all(event["kind"] == "timed" for event in events)
    rounds = [[e["index"] for e in events if e["record"]["repeat"] == n] for n in range(5)]
    assert [sorted(indexes) for indexes in rounds] == [sorted(HOOKS)] * 5
    assert len({tuple(indexes) for indexes in rounds}) > 2
    assert all([e["index"] for e in other] == [e["index"] for e in events] for other, _, _ in answers)
    assert kept
    assert memories == 1  # one set of weights for all models


def test_figures_are_means_over_ranks_of_that_step_alone(ranks):
    events = ranks(raced, 2, HOOKS, {}, {})[0][0]
    sent = {index: {e["record"]["sent_bytes"] for e in events if e["index"] == index} for index in HOOKS}
    parameters = 873_216
    assert (sent[0], sent[1], sent[4], sent[-1]) == ({4.0 * parameters}, {2.0 * parameters}, {4.0 * parameters}, {0.0})
    assert 0 < max(sent[3]) < 0.1 * 4 * parameters
    for event in events:
        record = event["record"]
        assert record["reference_bytes"] == 4 * parameters
        assert record["cpu_seconds"] > 0
        assert record["encode"] + record["wait"] + record["decode"] <= record["seconds"]
        assert record["wire"] <= record["busy"] <= record["seconds"]
        assert (record["wire"] > 0) == (event["index"] != -1)
        assert record["interface_bytes"] is None


def test_a_hook_that_fails_falls_out_and_the_others_go_on(ranks):
    hooks = {0: "allreduce", 1: "bf16", 2: "fp16", 3: "quantize_per_channel"}
    bad = {"bf16": Raises(), "quantize_per_channel": Raises(at_once=True)}
    for events, _, _ in ranks(raced, 2, hooks, {}, bad):
        dropped = {event["index"]: event["error"] for event in events if event["kind"] == "dropped"}
        assert "no more" in dropped[1]
        assert "not at all" in dropped[3]
        assert sorted(dropped) == [1, 3]
        timed = [event["index"] for event in events if event["kind"] == "timed"]
        assert [timed.count(index) for index in hooks] == [5, 2, 5, 0]  # three warm up


def test_pytorchs_own_hooks_take_turns_with_ours(ranks):
    hooks = {0: "torch:none", 1: "torch:allreduce", 2: "torch:fp16", 3: "torch:powersgd(rank=2)", 4: "allreduce"}
    events, kept, _ = ranks(raced, 2, hooks, {}, {})[0]
    assert [event["kind"] for event in events] == ["timed"] * 25, events[0]
    assert kept
    sent = {index: {e["record"]["sent_bytes"] for e in events if e["index"] == index} for index in hooks}
    assert sent[0] == sent[1] == sent[4] == {4.0 * 873_216}
    assert sent[2] == {2.0 * 873_216}
    assert all(number != number for number in sent[3])  # nobody can know


def test_a_timeline_has_the_last_steps_of_every_hook_on_every_rank(ranks):
    hooks = {0: "allreduce", 1: "torch:fp16", 2: "powersgd_rank2(start_step=0)"}
    answers = ranks(raced, 2, hooks, {"timeline": "timeline.json"}, {})
    *_, last = answers[0][0]
    events = last["trace"]["traceEvents"]
    names = {event["pid"]: event["args"]["name"] for event in events if event["name"] == "process_name"}
    assert sorted(names.values()) == sorted(f"rank {rank}: {hooks[hook]}" for hook in (0, 2) for rank in range(2))
    for pid in names:
        mine = [event for event in events if event["pid"] == pid and event["ph"] == "X"]
        assert {"compute", "blocked", "ready", "encode", "on the wire", "decode"} <= {event["name"] for event in mine}


def test_sharded_models_take_turns_too(ranks):
    hooks = {0: "allreduce", 1: "quantize_per_channel"}
    events, kept, _ = ranks(raced, 2, hooks, {"shard": 2}, {})[0]
    assert [event["kind"] for event in events] == ["timed"] * 10
    assert kept


def test_the_interface_is_that_of_the_processes(ranks):
    with patch.dict(os.environ, {"GLOO_SOCKET_IFNAME": "lo"}):
        assert _race._interface() is None
    with patch.dict(os.environ, {"GLOO_SOCKET_IFNAME": "none0"}):
        assert _race._interface() is None
