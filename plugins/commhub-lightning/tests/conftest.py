"""Stories on real ranks: each is played once, whichever tests and workers ask for it, and told from its files."""

import fcntl
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

HERE = Path(__file__).parent
LIMIT = 280.0
"""Seconds after which ranks are ended; a story takes a tenth of that."""


def start(script, *arguments, ranks, logs):
    """Run a script on some ranks, started as a launcher that is not Lightning's would, until all have ended."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("TORCHELASTIC", "SLURM", "PYTEST"))}
    kept |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANKS": str(ranks), "OMP_NUM_THREADS": "1"}
    kept["TORCH_FR_BUFFER_SIZE"] = "20000"  # torch's flight recorder, an account of bytes that is not commhub's
    running = []
    for rank in range(ranks):
        with (
            logs / f"{Path(script).stem}-{'-'.join(map(str, arguments[:2])).replace('/', '_')[-60:]}-{rank}.log"
        ).open("w") as log:
            command = [sys.executable, str(HERE / script), *map(str, arguments)]
            process = subprocess.Popen(command, env=kept | {"LOCAL_RANK": str(rank)}, stdout=log, stderr=log)
            running.append((process, Path(log.name)))
    end = time.monotonic() + LIMIT
    try:
        for process, _ in running:
            process.wait(max(0.0, end - time.monotonic()))
    except subprocess.TimeoutExpired:
        pass
    finally:
        for process, _ in running:
            process.kill()
            process.wait()
    return [(process.returncode, log.read_text()[-4000:]) for process, log in running]


class Scene(dict):
    """What came of one; that it failed is shown where a test asks for something that it lacks."""

    def __missing__(self, key):
        raise AssertionError(f"there is no {key!r}: {self.get('failed', 'the scene did not say')}")


class Stories:
    """What the stories came to, by scene.

    Args:
        folder: where they are played; workers of one test run share it.
    """

    def __init__(self, folder):
        self.folder = folder

    def scenes(self, package, story, ranks=2):
        """The scenes of each rank; plays the story first, unless that is done."""
        folder = self.folder / package
        folder.mkdir(exist_ok=True)
        if story in ("second", "alone"):
            self.scenes(package, "first")
        with (folder / f"{story}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            files = [folder / f"{story}-rank{rank}.json" for rank in range(ranks)]
            if not (folder / f"{story}.ended").exists():
                ended = start("job.py", package, story, folder, ranks=ranks, logs=folder)
                (folder / f"{story}.ended").write_text("\n".join(f"exit {code}\n{log}" for code, log in ended))
                if story == "first" and all(file.exists() for file in files):
                    (folder / "elsewhere").mkdir()
                    shutil.move(folder / "powersgd" / "epoch=0.ckpt", folder / "elsewhere" / "moved.ckpt")
                    shutil.rmtree(folder / "powersgd")
        assert all(file.exists() for file in files), (folder / f"{story}.ended").read_text()
        return [json.loads(file.read_text(), object_hook=Scene) for file in files]


@pytest.fixture(scope="session")
def stories(tmp_path_factory):
    """The stories of this test run."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "lightning-stories"
    folder.mkdir(exist_ok=True)
    return Stories(folder)


@pytest.fixture(scope="session", name="start")
def started():
    """The function that runs a script on ranks."""
    return start
