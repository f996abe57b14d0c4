"""Rules: settings for single parameters by glob on their names."""

import pytest

from commhub import HookOptionError
from commhub.toolkit import Rules

DEFAULTS = {"rank": 2, "rate": 2.0, "fast": True, "kind": "plain", "any": None}
NAMES = ("body.0.weight", "body.0.bias", "lm_head.weight", "lm_head.bias")


def test_without_rules_every_parameter_has_the_defaults():
    assert Rules({}, DEFAULTS).settings(NAMES) == dict.fromkeys(NAMES, DEFAULTS)


def test_a_rule_changes_what_it_names_and_dense_means_none():
    found = Rules({"*.bias": "dense", "lm_head.*": {"rank": 8}}, DEFAULTS).settings(NAMES)
    assert found["body.0.bias"] is None
    assert found["lm_head.weight"] == {**DEFAULTS, "rank": 8}
    assert found["body.0.weight"] == DEFAULTS


def test_the_longest_pattern_that_matches_decides_whatever_the_order():
    """A hook string sorts them, and ranks must not differ by it."""
    rules = {"*.bias": "dense", "lm_head.*": {"rank": 8}}
    backwards = dict(reversed(rules.items()))
    assert Rules(rules, DEFAULTS).settings(NAMES) == Rules(backwards, DEFAULTS).settings(NAMES)
    assert Rules(rules, DEFAULTS).settings(NAMES)["lm_head.bias"]["rank"] == 8
    assert Rules({"*.bias": "dense", "*": {"rank": 3}}, DEFAULTS).settings(NAMES)["lm_head.bias"] is None


def test_an_int_is_a_float_where_a_float_is_asked_for():
    assert Rules({"*": {"rate": 3}}, DEFAULTS).settings(NAMES)["lm_head.bias"]["rate"] == 3


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"*.bias": "sparse"}, "'dense' or a dict"),
        ({"*.bias": None}, "'dense' or a dict"),
        ({3: "dense"}, "no pattern"),
        ({"*": {"rnk": 2}}, "may set any, fast, kind, rank, rate"),
        ({"*": {"rank": 2.5}}, "no int"),
        ({"*": {"rank": True}}, "no int"),
        ({"*": {"fast": 1}}, "no bool"),
        ({"*": {"kind": 1}}, "no str"),
    ],
)
def test_a_malformed_rule_is_refused_where_it_is_made(rules, message):
    with pytest.raises(HookOptionError, match=message):
        Rules(rules, DEFAULTS)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("sparse", "rules: '*.bias' is 'sparse'; a rule of this hook can only be 'dense'."),
        (None, "rules: '*.bias' is None; a rule of this hook can only be 'dense'."),
        ({"rank": 2}, "rules: '*.bias' sets 'rank'; a rule of this hook can only be 'dense'."),
    ],
)
def test_a_hook_that_has_nothing_to_set_says_so(rule, message):
    with pytest.raises(HookOptionError) as told:
        Rules({"*.bias": rule}, {})
    assert str(told.value) == message


def test_a_rule_that_sets_nothing_takes_back_what_a_shorter_one_says():
    for defaults in (DEFAULTS, {}):
        found = Rules({"*": "dense", "lm_head.*": {}}, defaults).settings(NAMES)
        assert found == dict.fromkeys(NAMES[:2], None) | dict.fromkeys(NAMES[2:], defaults)


def test_the_hooks_own_check_sees_each_rules_whole_settings():
    def check(settings):
        if settings["rank"] < 1:
            raise ValueError(f"rank is {settings['rank']}; it must be at least 1.")

    with pytest.raises(HookOptionError, match=r"'lm_head.\*': rank is 0"):
        Rules({"*.bias": "dense", "lm_head.*": {"rank": 0}}, DEFAULTS, check)


def test_a_pattern_that_matches_nothing_is_refused():
    with pytest.raises(HookOptionError, match=r"'\*.biass' matches no parameter; the names are like body.0.weight"):
        Rules({"*.biass": "dense"}, DEFAULTS).settings(NAMES)
