"""A new package installs, is listed, passes its tests, and builds, with nothing changed by hand."""

import doctest
import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from click.testing import CliRunner
from torch.nn.parallel import DistributedDataParallel

from commhub.cli import main
from commhub.testing import mlp

ROOT = Path(__file__).parents[2]
OFFLINE = ("--no-index", "--no-build-isolation", "--disable-pip-version-check")


def new(folder, name, *options):
    """The folder of a new package `commhub-<name>`."""
    done = CliRunner().invoke(main, ["new", name, "--directory", str(folder), *options])
    assert done.exit_code == 0, done.output
    return folder / f"commhub-{name}"


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with one new package of each kind, and `site`, where both are installed."""
    folder = tmp_path_factory.mktemp("made")
    packages = [new(folder, "my-hook"), new(folder, "my-averager", "--averager")]
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", *OFFLINE, "--target", folder / "site"]
    subprocess.run([*command, *packages], check=True)
    return folder


@pytest.mark.skipif(
    not os.environ.get("COMMHUB_EVERY_CHECK"),
    reason="half a minute for an empty environment and two wheels: .ci/run sets COMMHUB_EVERY_CHECK",
)
def test_a_new_hook_builds_installs_is_listed_and_passes_its_tests_in_an_empty_environment(clean, tmp_path):
    clean.run("commhub", "new", "as-it-comes", "--author", "Ada Lovelace")
    from_wheel, from_source = files(clean.work / "commhub-as-it-comes"), files(new(tmp_path, "as-it-comes"))
    assert from_wheel == from_source  # nothing is missing from the core's wheel
    clean.pip("wheel", "--no-deps", "--wheel-dir", "dist", "./commhub-as-it-comes")
    (wheel,) = clean.work.glob("dist/*.whl")
    with zipfile.ZipFile(wheel) as archive:
        inside = archive.namelist()
    assert {name.partition("/")[0] for name in inside} == {"commhub_as_it_comes", "commhub_as_it_comes-0.1.0.dist-info"}
    assert "commhub_as_it_comes/py.typed" in inside
    clean.pip("install", f"{wheel}[test]")
    (row,) = json.loads(clean.run("commhub", "list", "as_it_comes", "--json"))
    assert (row["name"], row["kind"], row["distribution"], row["version"], row["status"], row["error"]) == (
        *("as_it_comes", "hook", "commhub-as-it-comes", "0.1.0", "ok", None),
    )
    assert "broken: none" in clean.run("commhub", "doctor")
    assert re.search(r"^\d+ passed", clean.run("python", "-m", "pytest", "-q", "commhub-as-it-comes"), re.M)


def test_a_new_averager_is_listed_and_passes_its_tests(made):
    def run(*arguments):
        environment = {**os.environ, "PYTHONPATH": str(made / "site")}
        command = [sys.executable, "-m", *arguments]
        return subprocess.run(command, env=environment, cwd=made, capture_output=True, text=True, check=False)

    (row,) = json.loads(run("commhub", "list", "my_averager", "--json").stdout)
    assert (row["kind"], row["distribution"], row["status"]) == ("averager", "commhub-my-averager", "ok")
    done = run("pytest", "-q", "-p", "no:cacheprovider", "commhub-my-averager")
    assert done.returncode == 0, done.stdout


def read(readme):
    """On a rank: run a README's code, as its reader would; returns how many examples showed what comes out."""
    namespace, shown = {"model": DistributedDataParallel(mlp())}, 0
    for language, code in re.findall(r"^```(python|pycon)\n(.*?)^```$", readme.read_text(), re.S | re.M):
        if language == "python":
            exec(code, namespace)
        else:
            example = doctest.DocTestParser().get_doctest(code, namespace, readme.name, None, 0)
            shown += doctest.DebugRunner().run(example).attempted
    return shown


@pytest.mark.parametrize("kind", ["hook", "averager"])
def test_the_readme_of_a_new_package_tells_the_truth(ranks, made, monkeypatch, kind):
    monkeypatch.syspath_prepend(made / "site")
    assert min(ranks(read, 2, made / f"commhub-my-{kind}/README.md")) > 0


@pytest.mark.parametrize("kind", ["hook", "averager"])
def test_a_new_package_keeps_the_style_of_this_repository(made, kind):
    pytest.importorskip("ruff", reason="ruff comes with the extra dev")
    for command in ("check", "format --check"):
        # Tests outside this repository: its settings for tests do not reach them.
        options = ["--ignore=D103"] if command == "check" else []
        ruff = [sys.executable, "-m", "ruff", *command.split(), "--no-cache", "--config", "pyproject.toml", *options]
        done = subprocess.run(
            [*ruff, made / f"commhub-my-{kind}"], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout
