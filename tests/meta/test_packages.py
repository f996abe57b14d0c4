"""The distributions keep the promises of the tree: what they contain, claim, require and import."""

import ast
import importlib
import inspect
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import commhub
from commhub.registry._documented import AVERAGERS, HOOKS

ROOT = Path(__file__).parents[2]
PLUGINS = sorted(path.parent for path in ROOT.glob("plugins/*/pyproject.toml"))
CONTRIB = sorted(path.parent for path in ROOT.glob("contrib/*/pyproject.toml"))
EVERY = pytest.mark.parametrize("folder", [*PLUGINS, *CONTRIB], ids=lambda folder: folder.name)


def project(folder):
    return tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def claims(folder):
    points = project(folder).get("entry-points", {})
    groups = {"hook": "commhub.hooks.v1", "averager": "commhub.averagers.v1"}
    return {(kind, name): target for kind, group in groups.items() for name, target in points.get(group, {}).items()}


def package(folder):
    return folder / folder.name.replace("-", "_")


def imports(path):
    """Every module that a file imports, at whatever depth, as (module, name or None)."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield from ((node.module, alias.name) for alias in node.names)


def serve_hooks():
    """The folders of plugins that offer hooks; the others are adapters for frameworks and for PyTorch's own names."""
    return [folder for folder in PLUGINS if claims(folder)]


def test_all_installs_the_hooks_of_plugins_and_nothing_else():
    extra = project(ROOT)["optional-dependencies"]["all"]
    assert sorted(Requirement(line).name for line in extra) == [folder.name for folder in serve_hooks()]


def test_every_adapter_has_extras_that_install_it_with_its_framework():
    extras = project(ROOT)["optional-dependencies"]
    named = {name: [Requirement(line) for line in lines] for name, lines in extras.items()}
    for folder in (folder for folder in PLUGINS if not claims(folder)):
        its = project(folder).get("optional-dependencies", {})
        wanted = sorted(its.keys() - {"test"}) or [folder.name.removeprefix("commhub-")]
        for extra in wanted:
            (required,) = named[extra]
            assert (required.name, str(required.specifier)) == (folder.name, "<1,>=0.1")
            assert required.extras == ({extra} if extra in its else set())


def test_a_framework_that_an_adapter_works_with_has_an_upper_bound():
    for folder in PLUGINS:
        for extra, lines in project(folder).get("optional-dependencies", {}).items():
            for required in map(Requirement, lines):
                assert extra == "test" or re.search("<", str(required.specifier)), f"{folder.name}: {required}"


def test_a_folder_of_plugins_holds_documented_names_only():
    for folder in serve_hooks():
        assert folder.name in {*HOOKS.values(), *AVERAGERS.values()}
        owned = {n for n, owner in [*HOOKS.items(), *AVERAGERS.items()] if owner == folder.name}
        assert {name for _, name in claims(folder)} == owned


def test_a_folder_of_contrib_takes_no_documented_name():
    for folder in CONTRIB:
        assert not {name for _, name in claims(folder)} & {*HOOKS, *AVERAGERS}


@EVERY
def test_a_plugin_has_what_a_package_needs(folder):
    data = project(folder)
    assert data["name"] == folder.name
    assert (data["license"], data["requires-python"]) == ("Apache-2.0", ">=3.11")
    assert (folder / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()
    assert (package(folder) / "py.typed").exists()
    assert list(folder.glob("tests/test_*.py"))
    readme = (folder / "README.md").read_text(encoding="utf-8")
    assert "```python" in readme
    assert all(name in readme for _, name in claims(folder))


@EVERY
def test_a_plugin_requires_this_major_version_of_the_core_and_caps_nothing_else(folder):
    required = {r.name: r for r in map(Requirement, project(folder)["dependencies"])}
    assert str(required["commhub"].specifier) == "<1,>=0.1"
    assert str(required["torch"].specifier) == ">=2.13"
    others = [r for name, r in required.items() if not name.startswith("commhub")]
    assert not [r for r in others if re.search("<|==|~", str(r.specifier))]


@EVERY
def test_entry_points_are_named_as_the_specs_and_work(folder):
    rows = [row for row in commhub.installed() if row.distribution == folder.name]
    assert {(row.kind, row.name) for row in rows} == set(claims(folder))
    for row in rows:
        assert (row.status, row.error) == ("ok", None)
        assert (row.spec.kind, row.spec.name, row.version) == (row.kind, row.name, project(folder)["version"])
        assert row.spec.sent_bytes
        assert row.spec.reference


@EVERY
def test_a_factory_takes_exactly_the_declared_options_with_their_defaults(folder):
    for row in commhub.installed():
        if row.distribution == folder.name:
            module, _, name = row.spec.factory.partition(":")
            parameters = inspect.signature(getattr(importlib.import_module(module), name)).parameters.values()
            declared = {option.name: option.default for option in row.spec.options}
            assert {p.name: p.default for p in parameters} == declared


@EVERY
def test_a_plugin_imports_only_what_commhub_exports(folder):
    declared = {Requirement(line).name.replace("-", "_") for line in project(folder)["dependencies"]}
    for path in package(folder).rglob("*.py"):
        for module, name in imports(path):
            top = module.partition(".")[0]
            if top == "commhub":
                assert module in ("commhub", "commhub.toolkit"), f"{path}: {module}"
                assert name is None or name in importlib.import_module(module).__all__, f"{path}: {name}"
            elif top.startswith("commhub_"):
                assert top == package(folder).name or (top in declared and module == top), f"{path}: {module}"


@EVERY
def test_a_package_requires_what_it_imports(folder):
    required = {Requirement(line).name.replace("-", "_") for line in project(folder)["dependencies"]}
    used = {module.partition(".")[0] for path in package(folder).rglob("*.py") for module, _ in imports(path)}
    assert used - set(sys.stdlib_module_names) - {package(folder).name} <= required


@EVERY
def test_a_spec_module_loads_no_torch(folder):
    models = project(folder).get("entry-points", {}).get("commhub.models.v1", {})
    modules = sorted({*claims(folder).values(), *models.values()}) or [package(folder).name]
    frameworks = ["torch", *models]
    code = f"import {', '.join(['sys', *modules])}; sys.exit(any(name in sys.modules for name in {frameworks}))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@EVERY
def test_a_plugin_uses_the_public_names_of_the_core_through_the_package(folder):
    """`commhub._x`, spelled as an attribute, is no more public than imported."""
    for path in package(folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "commhub":
                assert node.attr in commhub.__all__, f"{path}:{node.lineno}"


def test_versions_are_the_ones_that_the_packages_say():
    assert project(ROOT)["version"] == commhub.__version__


def test_torch_has_a_floor_and_no_cap_and_the_one_exact_pin_is_in_the_constraints():
    required = {r.name: str(r.specifier) for r in map(Requirement, project(ROOT)["dependencies"])}
    assert required["torch"] == ">=2.13"
    assert not [name for name, specifier in required.items() if re.search("<|==|~", specifier)]
    assert (ROOT / "constraints.txt").read_text().split() == ["torch==2.13.0"]
