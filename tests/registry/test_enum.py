"""The enum of installed hooks, and the modules generated from it."""

import pickle
import subprocess
import sys
from pathlib import Path

import pytest

import commhub
from commhub.registry import _enum, _lookup


def test_members_are_strings_equal_to_the_name(site):
    site.add("commhub-powersgd", "powersgd", "powersgd_rank2")
    member = commhub.HookType.POWERSGD_RANK2
    assert member == "powersgd_rank2"
    assert (str(member), f"{member}", isinstance(member, str)) == ("powersgd_rank2", "powersgd_rank2", True)


def test_the_enum_holds_what_is_installed_sorted(site):
    site.add("b-dist", "zeta")
    site.add("a-dist", "alpha", averagers=["often"])
    assert [member.name for member in commhub.HookType] == ["ALPHA", "ZETA"]


def test_the_spellings_of_pytorch_are_enum_aliases(site):
    site.add("commhub-powersgd", "powersgd", "powersgd_rank2")
    hook_type = commhub.HookType
    assert hook_type.POWER_SGD is hook_type.POWERSGD
    assert hook_type.POWER_SGD_RANK2 is hook_type.POWERSGD_RANK2
    assert not hasattr(hook_type, "FP16_COMPRESS")


def test_a_value_is_looked_up_like_any_name(site):
    site.add("commhub-powersgd", "powersgd", "powersgd_rank2")
    assert commhub.HookType("POWER-SGD") is commhub.HookType.POWERSGD
    with pytest.raises(ValueError, match="nothing"):
        commhub.HookType("nothing")


def test_names_that_a_bare_name_cannot_reach_are_left_out(site, monkeypatch):
    site.add("a-dist", "same", "fp16")
    site.add("b-dist", "same", "off")
    site.add("c-dist", "old", requires=["commhub>=99"])
    site.add("d-dist", announce=["not.a.name"])
    monkeypatch.setenv("COMMHUB_DISABLE", "off")
    assert list(commhub.HookType) == []


def test_building_the_enum_runs_no_plugin(site):
    module = site.add("some-dist", "some", source="raise SystemExit")
    assert commhub.HookType.SOME == "some"
    assert module not in sys.modules


def test_the_enum_is_one_object_until_the_installation_changes(site):
    site.add("some-dist", "some")
    before = commhub.HookType
    assert commhub.HookType is before
    site.add("other-dist", "other")
    assert [member.value for member in commhub.HookType] == ["other", "some"]


def test_members_can_be_pickled(site):
    site.add("some-dist", "some")
    assert commhub.HookType.__module__ == "commhub"
    assert pickle.loads(pickle.dumps(commhub.HookType.SOME)) is commhub.HookType.SOME


def test_calling_a_member_registers_it(site, monkeypatch):
    site.add("some-dist", "some")
    calls = []
    monkeypatch.setattr(commhub, "register", lambda *args, **options: calls.append((args, options)), raising=False)
    commhub.HookType.SOME("model", rank=4)
    assert calls == [(("model", "some"), {"rank": 4})]


def test_the_generated_module_of_documented_names_is_fresh():
    assert (Path(commhub.__file__).parent / "registry/_documented_names.py").read_text() == _enum.documented_source()


def test_the_generated_module_equals_the_enum(site, tmp_path):
    site.add("commhub-powersgd", "powersgd", "powersgd_rank2", averagers=["often"])
    space = {"__name__": "generated"}
    exec(_enum.installed_source(), space)
    assert [(m.name, m.value) for m in space["HookType"]] == [(m.name, m.value) for m in commhub.HookType]
    assert space["HookType"].POWER_SGD is space["HookType"].POWERSGD
    assert space["HookName"].__args__ == ("powersgd", "powersgd_rank2")
    assert space["AveragerName"].__args__ == ("often",)


def test_a_generated_module_registers_too(site, monkeypatch):
    site.add("some-dist", "some")
    monkeypatch.setattr(commhub, "register", lambda *args, **options: (args, options), raising=False)
    space = {"__name__": "generated"}
    exec(_enum.installed_source(), space)
    assert space["HookType"].SOME("model", rank=4) == (("model", "some"), {"rank": 4})


def test_nothing_installed_still_generates_a_module(site):
    space = {"__name__": "generated"}
    exec(_enum.installed_source(), space)
    assert list(space["HookType"]) == []


@pytest.mark.parametrize("installed", [0, 1])
def test_formatters_leave_generated_modules_alone(site, installed):
    if installed:
        site.add("commhub-powersgd", "powersgd", "powersgd_rank2", averagers=["often"])
    command = [
        sys.executable,
        "-m",
        "ruff",
        "format",
        "--check",
        "--stdin-filename",
        "x.py",
        "--isolated",
        "-",
    ]
    done = subprocess.run(command, input=_enum.installed_source(), text=True, capture_output=True)
    if "No module named" in done.stderr:
        pytest.skip("ruff is not installed")
    assert done.returncode == 0, done.stderr


def test_canonical_maps_aliases():
    assert _lookup.canonical("Bf16-Compress") == "bf16"
