"""Every hook that is wrong on purpose fails exactly its check: this is what proves the kit."""

import pytest

import commhub
from commhub.testing import check_hook, temporary_plugin
from commhub.testing.conformance._check import all_checks

from .zoo import SOURCE, ZOO

EVERYWHERE = ("static", "simulated", "ranks", "processes")
PLACES = {check.name: EVERYWHERE.index(check.where) for check in all_checks()}


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    hooks = {name: {"factory": kind, **fields} for name, (kind, fields, _) in ZOO.items()}
    with temporary_plugin(tmp_path_factory.mktemp("zoo"), "commhub-zoo", hooks=hooks, source=SOURCE) as plugin:
        yield plugin


def where_to_look(fails):
    """No further than it takes to be found; ranks are dear. What is right is looked at everywhere."""
    return EVERYWHERE[: 1 + max((max(1, PLACES[check]) for check in fails), default=len(EVERYWHERE))]


@pytest.mark.parametrize("name", ZOO)
def test_a_wrong_hook_fails_exactly_its_check(zoo, ranks, name):
    fails = ZOO[name][2]
    timeout = 5.0 if name == "blocks" else 60.0
    results = check_hook(name, nproc=(2,), where=where_to_look(fails), timeout=timeout, pool=ranks.pool)
    failed = {result.check: result.reason for result in results if result.status == "failed"}
    assert tuple(failed) == fails, failed
    assert all(reason.strip() for reason in failed.values())


def test_most_checks_have_a_hook_that_fails_them():
    failed = {check for _, _, fails in ZOO.values() for check in fails}
    hooks_only = {check.name for check in all_checks() if "hook" in check.kinds}
    elsewhere = {"loads", "name_is_its_own", "spec_without_torch", "spec_is_quick", "distribution_is_complete",
                 "core_has_an_upper_bound"}  # fmt: skip
    assert len(hooks_only - failed - elsewhere) <= 12, hooks_only - failed - elsewhere


def checked(name, **options):
    return {result.check: result for result in check_hook(name, where=("static",), **options)}


@pytest.mark.parametrize(
    ("fails", "fields"),
    [
        ("spec_without_torch", {"init": "import torch"}),
        ("spec_is_quick", {"init": "import time; time.sleep(0.06)"}),
        ("core_has_an_upper_bound", {"requires": ("commhub>=0.1",)}),
        ("core_has_an_upper_bound", {"requires": ()}),
        ("loads", {"spec": "raise ZeroDivisionError('planned')"}),
        ("loads", {"entry_points": {"commhub.hooks.v1": {"odd": "commhub_odd._spec", "other": "commhub_odd._spec"}}}),
    ],
)
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
        result = checked("odd")["distribution_is_complete"]
    assert result.status == "failed"
    assert told in result.reason


def test_a_name_that_belongs_to_a_documented_hook_is_not_its_own(tmp_path):
    hooks = {"fp16": {"factory": "Right", "exact": True, "sent_bytes": "0"}}
    with temporary_plugin(tmp_path, "commhub-odd", hooks=hooks, source=SOURCE):
        result = checked("commhub-odd:fp16")["name_is_its_own"]
        assert result.status == "failed"
        assert "commhub-fp16" in result.reason
        with pytest.raises(commhub.UnknownHookError):
            checked("no_such_hook")
