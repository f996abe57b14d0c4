"""The documented hooks and averagers keep what they declare."""

import os

import commhub
from commhub.registry._documented import AVERAGERS, HOOKS
from commhub.registry._hookstring import parse
from commhub.testing import parametrize_with_checks

GIVEN = {"periodic": "periodic(period=3)", "hierarchical": "hierarchical(periods={2: 1, 4: 2})"}
"""Those that have no default for what a user must choose."""
INSTALLED = [GIVEN.get(name, name) for name in commhub.hooks() if name in {*HOOKS, *AVERAGERS}]
ALL = bool(os.environ.get("COMMHUB_EVERY_CHECK"))


def spec_of(name):
    return commhub.info(parse(name).name).spec


def properties(name):
    """What a hook declares that decides which checks apply to it."""
    spec = spec_of(name)
    feedback = spec.option("error_feedback")
    agrees = getattr(spec, "agrees", None)
    return (spec.kind, bool(spec.needs), agrees is not False, feedback is not None and feedback.default)


ONE_OF_EACH = list({properties(name): name for name in reversed(INSTALLED)}.values())
"""On these alone the checks on ranks run here; `.ci/run` runs all checks on all hooks, from their wheels."""
OWN_CODE = list({spec_of(name).factory: name for name in reversed(INSTALLED)}.values())
"""Without the names that are presets of others' code."""


@parametrize_with_checks(INSTALLED, where=("static",))
def test_without_running_it(check):
    check()


@parametrize_with_checks(INSTALLED if ALL else OWN_CODE, where=("simulated",))
def test_in_one_process(check):
    check()


@parametrize_with_checks(INSTALLED if ALL else ONE_OF_EACH, nproc=(2, 4) if ALL else (2,), where=("ranks", "processes"))
def test_on_ranks(check):
    check()


def test_every_documented_name_is_installed_and_checked():
    assert {parse(text).name for text in INSTALLED} == {*HOOKS, *AVERAGERS}
    assert len(ONE_OF_EACH) >= 6
