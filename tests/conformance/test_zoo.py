"""Every hook and averager that is wrong on purpose fails exactly its check: this is what proves the kit."""

import os

import pytest

import commhub
from commhub.testing import check_hook, temporary_plugin
from commhub.testing.conformance._list import all_checks
from commhub.testing.conformance._run import Examination, plan

from .zoo import AVERAGERS, HOOKS, SOURCE, ZOO

EVERYTHING = bool(os.environ.get("COMMHUB_EVERY_CHECK"))
CHECKS = {check.name: check for check in all_checks()}
OF_THE_WHOLE_PLUGIN = ("spec_without_torch", "spec_is_quick")


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    hooks, averagers = (
        {name: {"factory": kind, **fields} for name, (kind, fields, _) in some.items()} for some in (HOOKS, AVERAGERS)
    )
    folder = tmp_path_factory.mktemp("zoo")
    with temporary_plugin(folder, "commhub-zoo", hooks=hooks, averagers=averagers, source=SOURCE) as plugin:
        yield plugin


def with_those_before(names):
    """These checks, and all that they come after."""
    return {*names}.union(*(with_those_before(CHECKS[name].after) for name in names))


def looked_at(check, fails):
    """Whether to run a check on what fails those: its own, and what these come after.

    What is right meets all in one process. Only COMMHUB_EVERY_CHECK runs every check on everything. That hooks that
    are right pass, on ranks too, the installed ones show.
    """
    if EVERYTHING or check.name in with_those_before(fails):
        return True
    return not fails and check.where in ("static", "simulated") and check.name not in OF_THE_WHOLE_PLUGIN


@pytest.mark.parametrize("name", ZOO)
def test_what_is_wrong_fails_exactly_its_check(zoo, ranks, name):
    fails = ZOO[name][2]
    examination = Examination(name, ranks.pool, timeout=2.0 if name == "blocks" else 60.0)
    for check, nproc in plan(examination.subject.info.kind, (2,)):
        if looked_at(check, fails):
            examination.run(check, nproc)
    failed = {result.check: result.reason for result in examination.results if result.status == "failed"}
    assert tuple(failed) == fails, failed
    assert all(reason.strip() for reason in failed.values())


def test_the_plugin_of_the_zoo_is_right_as_a_whole(zoo):
    assert [checked("right")[name].status for name in OF_THE_WHOLE_PLUGIN] == ["passed", "passed"]


def test_every_check_has_a_hook_averager_or_distribution_that_fails_it():
    failed = {check for _, _, fails in ZOO.values() for check in fails}
    failed |= {check for check, _ in DISTRIBUTIONS} | {COMPLETE, OWN_NAME}
    assert failed == {name for name, check in CHECKS.items() if check.where != "sharded"}  # test_sharded.py has those


def checked(name, **options):
    return {result.check: result for result in check_hook(name, where=("static",), **options)}


TWO_NAMES = {"commhub.hooks.v1": {"odd": "commhub_odd._spec", "other": "commhub_odd._spec"}}
DISTRIBUTIONS = [
    ("spec_without_torch", {"init": "import torch"}),
    ("spec_is_quick", {"init": "import time; time.sleep(0.06)"}),
    ("core_has_an_upper_bound", {"requires": ("commhub>=0.1",)}),
    ("core_has_an_upper_bound", {"requires": ()}),
    ("loads", {"spec": "raise ZeroDivisionError('planned')"}),
    ("loads", {"entry_points": TWO_NAMES}),
]
COMPLETE, OWN_NAME = "distribution_is_complete", "name_is_its_own"


@pytest.mark.parametrize(("fails", "fields"), DISTRIBUTIONS)
def test_a_distribution_that_is_wrong_fails_exactly_its_check(tmp_path, fails, fields):
    hooks = {"odd": {"factory": "Right", "exact": True, "sent_bytes": "0"}}
    with temporary_plugin(tmp_path, "commhub-odd", hooks=hooks, source=SOURCE, **fields):
        failed = [name for name, result in checked("odd").items() if result.status == "failed"]
    assert failed == [fails]


README = "\n# commhub-odd\n\nA plugin for one test, which is all.\n"


@pytest.mark.parametrize(("lacking", "told"), [("License: MIT\n", "licence"), (README, "README")])
def test_a_distribution_without_readme_or_licence_is_incomplete(tmp_path, lacking, told):
    hooks = {"odd": {"factory": "Right", "exact": True, "sent_bytes": "0"}}
    with temporary_plugin(tmp_path, "commhub-odd", hooks=hooks, source=SOURCE):
        file = next(tmp_path.glob("*.dist-info/METADATA"))
        assert lacking in file.read_text()
        file.write_text(file.read_text().replace(lacking, ""))
        result = checked("odd")[COMPLETE]
    assert result.status == "failed"
    assert told in result.reason


def test_a_name_that_belongs_to_a_documented_hook_is_not_its_own(tmp_path):
    hooks = {"fp16": {"factory": "Right", "exact": True, "sent_bytes": "0"}}
    with temporary_plugin(tmp_path, "commhub-odd", hooks=hooks, source=SOURCE):
        result = checked("commhub-odd:fp16")[OWN_NAME]
        assert result.status == "failed"
        assert "commhub-fp16" in result.reason
        with pytest.raises(commhub.UnknownHookError):
            checked("no_such_hook")
