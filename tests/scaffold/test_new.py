"""`commhub new`: which names it takes, what it writes, and that it writes all of it or nothing."""

import os
import re
import stat
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from click.testing import CliRunner

from commhub.cli import main
from commhub.registry._spec import RESERVED

ROOT = Path(__file__).parents[2]
HOOK_FILES = [
    *(".github/workflows/ci.yml", ".gitignore", "CHANGELOG.md", "LICENSE", "README.md"),
    *(f"commhub_my_hook/{name}" for name in ("__init__.py", "_hook.py", "py.typed", "spec.py")),
    *("pyproject.toml", "tests/test_conformance.py", "tests/test_hook.py"),
]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder, the current one."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def new(*arguments):
    return CliRunner().invoke(main, ["new", *arguments])


def refused(code, *arguments):
    """The one line that it says."""
    done = new(*arguments)
    assert done.exit_code == code, done.output
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    return line


def tree(folder):
    """Every file's content by path."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("name", ["my-hook", "my_hook", "commhub-my-hook", "commhub_my_hook"])
def test_all_spellings_of_a_name_make_one_package(here, name):
    done = new(name)
    assert done.exit_code == 0, done.output
    assert [p.name for p in here.iterdir()] == ["commhub-my-hook"]
    assert sorted(tree(here / "commhub-my-hook")) == HOOK_FILES
    project = tomllib.loads((here / "commhub-my-hook/pyproject.toml").read_text())["project"]
    assert project["name"] == "commhub-my-hook"
    assert project["entry-points"] == {"commhub.hooks.v1": {"my_hook": "commhub_my_hook.spec"}}


def test_it_says_what_it_made_and_the_next_three_commands(here):
    lines = new("my-hook", "--directory", str(here)).stdout.splitlines()
    assert set(HOOK_FILES) <= {line.strip() for line in lines}
    assert [line.split()[-1] for line in lines[-3:]] == [
        f"'{here}/commhub-my-hook[test]'",
        "my_hook",
        f"{here}/commhub-my-hook",
    ]


@pytest.mark.parametrize("kind", ["hook", "averager"])
def test_no_placeholder_is_left_and_every_name_follows_from_the_one(here, kind):
    assert new("odd-2-name", *(["--averager"] if kind == "averager" else [])).exit_code == 0
    files = {path: content.decode() for path, content in tree(here / "commhub-odd-2-name").items()}
    assert {path for path, text in files.items() if re.search(r"\$(?!\{\{ matrix\.python \}\}| pip )", text)} == set()
    assert "class Odd2Name:" in files[f"commhub_odd_2_name/_{kind}.py"]
    assert 'name="odd_2_name"' in files["commhub_odd_2_name/spec.py"]
    assert not [path for path in files if path.endswith("-tpl") or "package" in path]


def test_the_workflow_tests_the_oldest_and_a_newer_python(here):
    assert new("my-hook").exit_code == 0
    lines = (here / "commhub-my-hook/.github/workflows/ci.yml").read_text().split("\n")
    assert '        python: ["3.11", "3.13"]' in lines
    assert "          python-version: ${{ matrix.python }}" in lines
    assert [line.strip() for line in lines if "commhub list" in line or "pytest" in line] == [
        "- run: commhub list my_hook",
        "- run: python -m pytest",
    ]


@pytest.mark.parametrize("kind", ["hook", "averager"])
def test_a_new_package_is_what_a_package_of_contrib_has_to_be(here, kind):
    assert new("my-own", *(["--averager"] if kind == "averager" else [])).exit_code == 0
    folder = here / "commhub-my-own"
    project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
    assert (project["license"], project["requires-python"]) == ("Apache-2.0", ">=3.11")
    assert {"commhub>=0.1,<1", "torch>=2.13"} <= set(project["dependencies"])
    assert list(project["entry-points"]) == [f"commhub.{kind}s.v1"]
    assert (folder / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()


@pytest.mark.parametrize(
    "name",
    ["", "1st", "my hook", "my--hook", "my-", "_my", "MyHook", "hök", "../x", "a/b", "my.hook", "a\n", "commhub-"],
)
def test_what_is_no_name_is_wrong_usage(here, name):
    assert "such as 'my-hook'" in refused(2, name)
    assert tree(here) == {}


@pytest.mark.parametrize("name", ["lambda", "none", "commhub-class", "commhub_true"])
def test_a_keyword_is_refused(here, name):
    assert "Python keyword" in refused(2, name)


@pytest.mark.parametrize("name", ["wire", "process-group", "commhub", "commhub-optimizer"])
def test_a_reserved_word_is_refused(here, name):
    assert "reserved" in refused(2, name)


@pytest.mark.parametrize(
    ("name", "owner"),
    [
        ("fp16", "commhub-fp16"),
        ("power-sgd", "commhub-powersgd"),
        ("periodic", "commhub-post-local-sgd"),
        ("quantize", "commhub-quantize"),
    ],
)
def test_a_documented_name_alias_or_distribution_is_not_free(here, name, owner):
    assert f"belongs to {owner}" in refused(1, name)
    assert "belongs to" in refused(1, name, "--averager")
    assert list(here.iterdir()) == []


def test_a_name_that_an_installed_distribution_offers_is_not_free(here, temporary_plugin):
    temporary_plugin("someones", hooks={"my_hook": "Foo"}, version="2.5")
    temporary_plugin("commhub-their-own", averagers={"something_else": "Foo"})
    line = refused(1, "my-hook", "--averager")
    assert "someones 2.5" in line
    assert "the hook 'my_hook'" in line
    assert "commhub-their-own 1.0" in refused(1, "their-own")
    assert new("another").exit_code == 0


@pytest.mark.parametrize("kind", ["file", "empty folder", "link to nothing", "package"])
def test_nothing_is_overwritten(here, kind):
    place = here / "commhub-my-hook"
    if kind == "file":
        place.write_text("mine")
    elif kind == "empty folder":
        place.mkdir()
    elif kind == "link to nothing":
        place.symlink_to("nowhere")
    else:
        new("my-hook")
        (place / "README.md").write_text("mine")
    before = tree(here)
    assert "commhub-my-hook exists already" in refused(1, "my-hook")
    assert tree(here) == before
    assert [p.name for p in here.iterdir()] == ["commhub-my-hook"]
    assert place.is_symlink() == (kind == "link to nothing")


def test_a_disk_that_fills_up_leaves_nothing_behind(here, monkeypatch):
    written, write = [], Path.write_bytes

    def fill(path, content):
        written.append(path)
        if len(written) == 5:
            raise OSError(28, "No space left on device")
        return write(path, content)

    monkeypatch.setattr(Path, "write_bytes", fill)
    assert "No space left on device" in refused(1, "my-hook")
    assert len(written) == 5
    assert list(here.iterdir()) == []


def test_the_folder_is_open_to_whom_the_umask_says(here):
    mask = os.umask(0o027)
    try:
        new("my-hook")
    finally:
        os.umask(mask)
    assert stat.S_IMODE((here / "commhub-my-hook").stat().st_mode) == 0o750


@pytest.mark.parametrize("place", ["missing", "a file"])
def test_a_directory_that_is_none_is_wrong_usage(here, place):
    (here / "a file").write_text("mine")
    assert "is no folder" in refused(2, "my-hook", "--directory", place)
    assert sorted(tree(here)) == ["a file"]


def test_it_is_made_in_the_directory_that_is_given(here, tmp_path):
    done = new("my-hook", "--directory", str(tmp_path))
    assert (tmp_path / "commhub-my-hook/pyproject.toml").exists(), done.output
    assert list(here.iterdir()) == []


def test_it_loads_no_torch(here):
    command = [sys.executable, "-X", "importtime", "-m", "commhub", "new", "my-hook"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "commhub.scaffold" in loaded
    assert "torch" not in loaded


@pytest.mark.parametrize(
    ("author", "names"),
    [
        (None, ["The authors of commhub-my-hook"]),
        ("Ada Lovelace", ["Ada Lovelace"]),
        ('A "$hook" \\ Ünal, B', ['A "$hook" \\ Ünal', "B"]),
    ],
)
def test_authors_stand_in_the_package(here, author, names):
    assert new("my-hook", *([] if author is None else ["--author", author])).exit_code == 0
    project = tomllib.loads((here / "commhub-my-hook/pyproject.toml").read_text())["project"]
    assert [entry["name"] for entry in project["authors"]] == names
    assert f"Owner: {', '.join(names)}." in (here / "commhub-my-hook/README.md").read_text()


@pytest.mark.parametrize("author", ["", " , ", "two\nlines", "a\x7fb"])
def test_an_author_without_a_name_is_wrong_usage(here, author):
    assert "the author is" in refused(2, "my-hook", "--author", author)
    assert list(here.iterdir()) == []


def test_every_argument_that_the_core_reserves_is_refused(here):
    for word in RESERVED:
        assert "reserved" in refused(2, word)
