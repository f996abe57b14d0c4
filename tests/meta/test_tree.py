"""The core's shape: floors that import downwards, small files, fresh generated ones, no torch where none is needed."""

import ast
import graphlib
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CORE = sorted(ROOT.glob("commhub/**/*.py"))

ROOMS = sorted(path.parent.name for path in ROOT.glob("commhub/*/__init__.py"))
"""The packages of the core."""

RAISES = r"\b[Rr]aises (an? |one )?`*[A-Z]\w*Error\b|(?<!Raise )\b[A-Z]\w+Error (if|outside|unless|when|where)\b"
"""What belongs in a section ``Raises:``, as a part of a sentence. That a function does nothing else is a summary."""


def run(*command, **options):
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, **options)


def test_the_core_imports_no_plugin():
    for path in CORE:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not [name for name in names if name.startswith("commhub_")], path


def test_floors_import_downwards_only():
    pytest.importorskip("importlinter")
    done = run(sys.executable, "-c", "from importlinter.cli import lint_imports_command as c; c()")
    assert done.returncode == 0, done.stdout


def test_no_files_import_each_other_in_a_circle_not_even_for_annotations():
    """The face stands apart: it names every room, and loads one when it is asked for a name of it."""
    grimp = pytest.importorskip("grimp")
    graph = grimp.build_graph("commhub", cache_dir=None)
    imported = {
        module: graph.find_modules_directly_imported_by(module) - {"commhub"} for module in graph.modules - {"commhub"}
    }
    graphlib.TopologicalSorter(imported).prepare()


def test_an_engine_is_asked_and_nobody_reaches_through_it():
    """Outside of ``steps/`` no file of ``training/`` uses an engine's driver or state, but hands them on at most."""
    through = []
    for path in sorted((ROOT / "commhub/training").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            inner = node.value if isinstance(node, ast.Attribute) else None
            if isinstance(inner, ast.Attribute) and inner.attr in ("driver", "state", "rounds"):
                owner = inner.value
                name = owner.attr if isinstance(owner, ast.Attribute) else getattr(owner, "id", "")
                through += [f"{path.name}:{node.lineno}"] * (
                    name.strip("_") == "engine" and path.parent.name != "steps"
                )
    assert through == []


def test_a_file_is_one_concept_of_at_most_300_lines_and_says_which():
    texts = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in CORE}
    assert {path: text.count("\n") for path, text in texts.items() if text.count("\n") > 300} == {}
    assert [path for path, text in texts.items() if not ast.get_docstring(ast.parse(text))] == []


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_has_a_readme_of_25_lines_and_tests_and_every_package_of_it_has_floors(room):
    folder = ROOT / "commhub" / room
    assert 0 < (folder / "README.md").read_text(encoding="utf-8").count("\n") <= 25
    assert list((ROOT / "tests" / room).glob("test_*.py"))
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"][
        "contracts"
    ]
    exhaustive = {name for one in contracts if one.get("exhaustive") for name in one["containers"]}
    packages = [path.parent.relative_to(ROOT) for path in folder.rglob("__init__.py")]
    assert {".".join(package.parts) for package in packages} <= exhaustive


def docstrings(path):
    """Each docstring of a file, those of attributes included, with its line and the node that it describes."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            for said in node.body:
                match said:
                    case ast.Expr(value=ast.Constant(value=str(text))):
                        yield text, said.lineno, node


def test_docstrings_have_double_backticks_and_say_what_is_raised_in_a_section():
    sources = [*CORE, *ROOT.glob("plugins/*/commhub_*/**/*.py"), *ROOT.glob("contrib/*/commhub_*/**/*.py")]
    assert len(sources) > 150
    wrong = []
    for path in sources:
        where = path.relative_to(ROOT).as_posix()
        for text, line, node in docstrings(path):
            bare = re.sub("``.*?``", "", text, flags=re.DOTALL)
            sentence = not isinstance(node, ast.Module) and re.search(RAISES, text)
            wrong += [f"{where}:{line}"] * ("`" in bare or bool(sentence))
    assert wrong == []


def test_the_generated_names_are_fresh():
    command = [
        sys.executable,
        "-m",
        "commhub",
        "enum",
        "--documented",
        "--check",
        "commhub/registry/_documented_names.py",
    ]
    done = run(*command)
    assert done.returncode == 0, done.stderr


def test_the_catalogue_of_hooks_is_fresh_and_can_be_stale(tmp_path):
    script = ROOT / "docs/generate_catalogue.py"
    done = run(sys.executable, str(script), "--check")
    assert done.returncode == 0, done.stderr
    (tmp_path / script.name).write_bytes(script.read_bytes())
    (tmp_path / "hooks.md").write_text("old")
    assert run(sys.executable, str(tmp_path / script.name), "--check").returncode == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ["-c", "import commhub"],
        ["-c", "import commhub; commhub.hooks(), commhub.HookType.ALLREDUCE, commhub.info('fp16')"],
        ["-c", "import commhub; commhub.HookSpec, commhub.AllReduce, commhub.HookError, commhub.Network"],
        ["-m", "commhub", "--help"],
        ["-m", "commhub", "--version"],
        ["-m", "commhub", "list"],
        ["-m", "commhub", "list", "--json"],
        ["-m", "commhub", "info", "powersgd"],
        ["-m", "commhub", "enum", "--check", os.devnull],
        ["-m", "commhub", "bench", "--help"],
    ],
    ids=lambda arguments: " ".join(arguments[1:]),
)
def test_no_torch_is_loaded_by(arguments):
    done = run(sys.executable, "-X", "importtime", *arguments)
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "commhub" in loaded
    assert not {name.split(".")[0] for name in loaded} & {"torch", "numpy", "rich", "matplotlib"}


def test_a_test_fails_where_the_core_warns(tmp_path):
    (tmp_path / "commhub_warns.py").write_text("import warnings\ndef f(): warnings.warn('careful')")
    (tmp_path / "test_it.py").write_text("import commhub_warns\ndef test(): commhub_warns.f()")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", "pyproject.toml", "--rootdir", "."]
    done = run(*command, str(tmp_path), env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert done.returncode == 1, done.stdout
    assert "UserWarning: careful" in done.stdout


def test_the_public_face_exports_what_it_says():
    import commhub

    assert sorted(commhub.__all__) == commhub.__all__
    assert set(commhub.__all__) == set(commhub._HOMES)
    for name in commhub.__all__:
        assert getattr(commhub, name) is not None


def test_the_changelog_has_a_section_for_this_version():
    import commhub

    assert f"## {commhub.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_the_makefile_stays_short():
    assert (ROOT / "Makefile").read_text(encoding="utf-8").count("\n") < 30
