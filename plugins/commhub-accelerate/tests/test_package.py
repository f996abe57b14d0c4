"""The package by itself: what it needs, and what it says where that is not there."""

import importlib.util
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from commhub_accelerate import _framework
from commhub_accelerate._around import around
from packaging.requirements import Requirement

import commhub

PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_the_bounds_are_those_of_the_extras():
    for package, bounds in _framework.BOUNDS.items():
        lines = map(Requirement, PROJECT["optional-dependencies"][package])
        assert str(next(line.specifier for line in lines if line.name == package)) == str(
            _framework.SpecifierSet(bounds)
        )


@pytest.mark.parametrize("module", ["", ".transformers", "._attach"])
def test_importing_loads_no_framework(module):
    code = f"import sys, commhub_accelerate{module}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert not {"accelerate", "transformers", "peft"} & set(done.stdout.split())
    assert module or "torch" not in done.stdout.split()


def test_importing_the_table_of_models_loads_no_torch():
    code = "import sys, commhub_accelerate.models as m; sys.exit(bool({'torch', 'accelerate'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0


def test_every_foreign_type_has_an_entry_point_and_is_where_the_table_says():
    from commhub_accelerate.models import MODELS

    points = PROJECT["entry-points"]["commhub.models.v1"]
    assert {spec.type.partition(".")[0] for spec in MODELS} == set(points)
    assert set(points.values()) == {"commhub_accelerate.models"}
    for spec in MODELS:
        module, _, name = spec.type.rpartition(".")
        if importlib.util.find_spec(module.partition(".")[0]) is not None:
            assert hasattr(importlib.import_module(module), name)


def test_without_the_framework_the_error_says_what_to_install(monkeypatch):
    def absent(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(_framework.metadata, "version", absent)
    from commhub_accelerate import attach
    from commhub_accelerate import transformers as trainers

    for call, extra in ((attach, "accelerate"), (trainers.attach, "transformers")):
        with pytest.raises(commhub.PluginError, match=rf"pip install 'commhub-accelerate\[{extra}\]'"):
            call(object(), "fp16")


def test_a_version_that_is_not_known_is_refused_by_name(monkeypatch):
    monkeypatch.setattr(_framework.metadata, "version", lambda name: "0.1")
    with pytest.raises(commhub.PluginError, match=r"accelerate >=1.15,<1.16, and 0.1 is installed"):
        _framework.require("accelerate")


class Owner:
    """Something with a method."""

    def double(self, number):
        return 2 * number


def test_a_method_is_taken_over_on_one_object_and_given_back():
    mine, other = Owner(), Owner()
    undo = around(mine, "double", lambda method, number: method(number) + 1)
    assert (mine.double(2), other.double(2)) == (5, 4)
    undo()
    assert (mine.double(2), vars(mine)) == (4, {})


def test_what_somebody_else_has_put_in_a_methods_place_is_called_and_put_back():
    mine = Owner()
    mine.double = theirs = lambda number: 100
    undo = around(mine, "double", lambda method, number: method(number) + 1)
    assert mine.double(2) == 101
    undo()
    assert mine.double is theirs


def test_what_somebody_else_has_put_around_ours_stays():
    mine = Owner()
    undo = around(mine, "double", lambda method, number: method(number) + 1)
    ours = mine.double
    mine.double = theirs = lambda number: ours(number)
    undo()
    assert mine.double is theirs
