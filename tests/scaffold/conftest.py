"""An environment that knows the core's wheel, what that requires, and nothing else."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OFFLINE = ("--no-index", "--no-build-isolation", "--disable-pip-version-check")


class Clean:
    """A virtual environment under `folder`; commands run in `folder/work`."""

    def __init__(self, folder):
        self.folder = folder
        self.work = folder / "work"
        self.work.mkdir()
        self._bin = folder / "venv/bin"
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", self._bin.parent], check=True)
        # Packages that it may see and pip must not touch lie outside it.
        borrowed = _borrowed(folder / "borrowed")
        (site,) = self._bin.parent.glob("lib/python*/site-packages")
        (site / "borrowed.pth").write_text(f"{borrowed}\n")
        self.install("pyproject.toml", "README.md", "LICENSE", "commhub")

    def run(self, *command):
        """What the command printed; it must end well."""
        environment = {"PATH": f"{self._bin}:{os.defpath}", "HOME": str(self.work), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            command, cwd=self.work, env=environment, capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def install(self, *paths):
        """Install the distribution that these files and folders of the repository make up, as a wheel."""
        source = self.folder / f"source{len(list(self.folder.glob('source*')))}"  # building leaves folders behind
        source.mkdir()
        for path in (ROOT / name for name in paths):
            if path.is_dir():
                shutil.copytree(path, source / path.name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(path, source)
        self.pip("install", "--quiet", "--no-compile", source)

    def pip(self, command, *arguments):
        return self.run("python", "-m", "pip", command, *OFFLINE, *map(str, arguments))


def _borrowed(folder):
    """Links to what is installed here, except for commhub and its plugins."""
    folder.mkdir()
    for home in {Path(sysconfig.get_path(kind)).resolve() for kind in ("purelib", "platlib")}:
        for path in home.iterdir():
            if "commhub" not in path.name and path.suffix != ".pth":
                (folder / path.name).symlink_to(path)
    return folder


@pytest.fixture(scope="session")
def clean(tmp_path_factory):
    return Clean(tmp_path_factory.mktemp("clean"))
