"""What is recommended, and its reason: the honest answer where nothing pays, and accuracy before a little speed."""

import json

import pytest

from commhub import HookSpec
from commhub.advice._advice import FASTEST, Advice, HookAdvice, Recommendation, accuracy_of, pays_below, recommend

ALL = ("exact", "rounding", "lossy")


def row(hook, seconds, accuracy="exact", **others):
    values = {"sent_bytes": 1.0, "pays_below_bits_per_second": 1e9} | others
    return HookAdvice(hook=hook, predicted_step_seconds=seconds, accuracy=accuracy, **values)


PLAIN = row("allreduce", 1.0)


def test_where_nothing_is_worth_its_cost_it_says_so():
    found = recommend([PLAIN, row("fp16", 0.97, "rounding")], PLAIN, silent_seconds=0.9, allowed=ALL)
    assert found.hook == "allreduce"
    assert found.reason.startswith("nothing here is worth its cost: of a step with allreduce, 10% is spent waiting")
    assert "the fastest hook, fp16, would take 0.97 of its time" in found.reason


def test_the_fastest_that_is_allowed_is_recommended():
    hooks = [PLAIN, row("fp16", 0.6, "rounding"), row("powersgd", 0.3, "lossy")]
    assert recommend(hooks, PLAIN, silent_seconds=0.2, allowed=ALL).hook == "powersgd"
    assert recommend(hooks, PLAIN, silent_seconds=0.2, allowed=("exact", "rounding")).hook == "fp16"
    assert recommend(hooks, PLAIN, silent_seconds=0.2, allowed=("exact",)).hook == "allreduce"


def test_of_those_that_are_about_as_fast_the_most_accurate_one_is():
    hooks = [PLAIN, row("fp16", 0.31, "rounding"), row("powersgd", 0.3, "lossy")]
    found = recommend(hooks, PLAIN, silent_seconds=0.2, allowed=ALL)
    assert found.hook == "fp16"
    assert "within 5% of the fastest, powersgd" in found.reason


def test_a_hook_that_leaves_ranks_apart_is_never_recommended():
    hooks = [PLAIN, row("noop", 0.1, "lossy", agrees=False)]
    assert recommend(hooks, PLAIN, silent_seconds=0.1, allowed=ALL).hook == "allreduce"


@pytest.mark.parametrize("bound", [2e6, 3.3e9, 7e12])
def test_the_bandwidth_below_which_it_pays_is_found(bound):
    assert pays_below(lambda rate: rate < bound) == pytest.approx(bound, rel=2e-3)


def test_never_and_always_are_told_apart():
    assert pays_below(lambda _: False) is None
    assert pays_below(lambda _: True) == FASTEST


def test_json_has_the_names_that_are_promised():
    advice = Advice(
        link={"bits_per_second": 1e9},
        hooks=(row("fp16", 0.5, "rounding", pays_below_bits_per_second=FASTEST),),
        recommendation=Recommendation(hook="fp16", reason="because"),
    )
    document = json.loads(json.dumps(advice.as_dict(), allow_nan=False))
    assert set(document) == {"link", "hooks", "recommendation"}
    (first,) = document["hooks"]
    assert {"hook", "predicted_step_seconds", "sent_bytes", "pays_below_bits_per_second", "accuracy"} <= set(first)
    assert document["recommendation"] == {"hook": "fp16", "reason": "because"}


@pytest.mark.parametrize(
    ("fields", "accuracy"), [({"exact": True}, "exact"), ({"tolerance": 1e-3}, "rounding"), ({}, "lossy")]
)
def test_the_class_of_accuracy_is_what_the_spec_declares(fields, accuracy):
    spec = HookSpec(name="mine", summary="A hook.", factory="module:Class", **fields)
    assert accuracy_of(spec) == accuracy
