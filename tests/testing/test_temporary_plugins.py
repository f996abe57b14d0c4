"""A temporary plugin is a real one: metadata, specs and code are found as if pip had installed them."""

import base64
import hashlib
import importlib.metadata
import json
import os
import subprocess
import sys

import pytest
import torch

import commhub
from commhub.testing import temporary_plugin as make_plugin

FOO = """
    class Foo:
        def __init__(self, factor=2.0):
            self.factor = factor
"""
FIELDS = {
    "factory": "Foo",
    "summary": "Multiplies.",
    "options": [{"name": "factor", "type": float, "default": 2.0, "help": "By what."}],
    "tolerance": 0.5,
}


def row(name):
    return next((info for info in commhub.installed() if info.name == name), None)


def test_its_hook_is_found_described_and_made(temporary_plugin):
    temporary_plugin("commhub-foo", hooks={"foo": FIELDS}, source=FOO, version="1.2")
    info = commhub.info("foo")
    assert (info.distribution, info.version, info.status) == ("commhub-foo", "1.2", "ok")
    assert (info.summary, info.spec.tolerance, info.spec.option("factor").default) == (
        "Multiplies.",
        0.5,
        2.0,
    )
    module, _, name = info.spec.factory.partition(":")
    assert getattr(importlib.import_module(module), name)(factor=3.0).factor == 3.0


def test_one_class_name_is_enough_for_a_spec(temporary_plugin):
    temporary_plugin("commhub-foo", hooks={"foo": "Foo", "bar": "Foo"}, averagers={"now_and_then": "Foo"})
    assert (row("foo").status, row("bar").kind, row("now_and_then").kind) == ("ok", "hook", "averager")


def test_afterwards_nothing_of_it_is_left(tmp_path):
    path, python_path, modules = list(sys.path), os.environ.get("PYTHONPATH"), set(sys.modules)
    with make_plugin(tmp_path, hooks={"foo": "Foo"}, source=FOO):
        assert row("foo").status == "ok"
        assert "commhub_foo._spec" in sys.modules
    assert row("foo") is None
    assert (sys.path, os.environ.get("PYTHONPATH")) == (path, python_path)
    assert not {name for name in set(sys.modules) - modules if name.startswith("commhub_foo")}


def test_two_plugins_may_claim_one_name(temporary_plugin):
    temporary_plugin("commhub-one", hooks={"foo": "Foo"})
    temporary_plugin("commhub-two", hooks={"foo": "Foo"})
    assert [info.status for info in commhub.installed() if info.name == "foo"] == ["conflict"] * 2


@pytest.mark.parametrize(
    "broken",
    [
        {"spec": "raise RuntimeError('not today')"},
        {"init": "import no_such_module"},
        {"entry_points": {"commhub.hooks.v1": {"foo": "no_such_module"}}},
    ],
    ids=lambda broken: next(iter(broken)),
)
def test_a_plugin_can_be_broken_on_purpose(temporary_plugin, broken):
    temporary_plugin("commhub-foo", hooks={"foo": "Foo"}, **broken)
    assert row("foo").status == "broken"


def test_a_plugin_can_ask_for_another_core(temporary_plugin):
    temporary_plugin("commhub-foo", hooks={"foo": "Foo"}, requires=["commhub>=9"])
    assert row("foo").status == "incompatible"


def test_its_record_lists_every_file_with_its_hash(tmp_path):
    with make_plugin(tmp_path, hooks={"foo": "Foo"}, source=FOO) as plugin:
        distribution = importlib.metadata.distribution("commhub-foo")
        files = {str(file): file for file in distribution.files}
        written = {str(p.relative_to(plugin.folder)) for p in plugin.folder.rglob("*") if p.is_file()}
        assert set(files) == {path for path in written if "__pycache__" not in path}
        for file in files.values():
            if file.hash is not None:
                digest = hashlib.sha256(file.read_binary()).digest()
                assert file.hash.value == base64.urlsafe_b64encode(digest).rstrip(b"=").decode()


def factor_and_file(name):
    info = row(name)
    if info is None:
        return None
    module = importlib.import_module(info.spec.factory.partition(":")[0])
    return module.Foo().factor, torch.tensor(1).item()


def test_the_ranks_find_it_as_long_as_it_is_there(ranks, tmp_path):
    assert ranks(factor_and_file, 2, "foo") == [None, None]
    with make_plugin(tmp_path / "a", hooks={"foo": "Foo"}, source=FOO):
        assert ranks(factor_and_file, 2, "foo") == [(2.0, 1)] * 2
    assert ranks(factor_and_file, 2, "foo") == [None, None]
    with make_plugin(tmp_path / "b", hooks={"foo": "Foo"}, source=FOO.replace("2.0", "5.0")):
        assert ranks(factor_and_file, 2, "foo") == [(5.0, 1)] * 2


@pytest.mark.parametrize("name", ["", "..", "../there", "/there", ".", None, 3, "a b", "-a"])
def test_a_name_that_leads_out_of_the_folder_is_refused(tmp_path, name):
    with pytest.raises(commhub.HookOptionError, match="no distribution's name"):
        make_plugin(tmp_path, name)
    assert list(tmp_path.iterdir()) == []


def test_a_subprocess_finds_it_too(temporary_plugin):
    temporary_plugin("commhub-foo", hooks={"foo": "Foo"})
    code = "import commhub, json; print(json.dumps([i.name for i in commhub.installed()]))"
    environ = os.environ | {"PYTHONPATH": os.pathsep.join([os.environ["PYTHONPATH"], *sys.path])}
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, env=environ)
    assert "foo" in json.loads(done.stdout)
