"""Two ranks that run every scenario once, in two generations of processes, and a single process."""

import contextlib
import importlib.util
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

RANKS = Path(__file__).parent / "ranks"
LIMIT = 420
"""Seconds for one generation, whose most part is the import of the frameworks. It is judged by what it leaves."""

collect_ignore = ["ranks"]


class Results:
    """What the scenarios returned, by name: a list with one value a rank."""

    def __init__(self, folder):
        self.folder = folder

    def __call__(self, name, phase="first", ranks=2):
        import torch

        found = []
        for rank in range(ranks):
            path = self.folder / f"{phase}-{name}-{rank}.pt"
            log = self.folder / f"{phase}-{rank}.log"
            assert path.exists(), f"rank {rank} left no result:\n{log.read_text()[-3000:]}"
            result = torch.load(path, weights_only=False)
            assert result["error"] is None, f"rank {rank}: {result['error']}"
            found.append(result["value"])
        return found


def _launch(folder, phase, size):
    """Run a generation; end it when its time is up, or when a rank has died and the others wait for it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "COV_"))}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "HF_HUB_OFFLINE": "1"}
    environment["TORCH_FR_BUFFER_SIZE"] = "20000"  # torch's flight recorder: an account of bytes that is not commhub's
    command = [sys.executable, "-W", "ignore", str(RANKS / "main.py"), str(folder), phase]
    with contextlib.ExitStack() as stack:
        ranks = []
        for rank in range(size):
            mine = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size} if size > 1 else {}
            log = stack.enter_context((folder / f"{phase}-{rank}.log").open("w"))
            both = environment | {name: str(value) for name, value in mine.items()}
            ranks.append(subprocess.Popen(command, env=both, stdout=log, stderr=log))
        end = time.monotonic() + LIMIT
        while any(rank.poll() is None for rank in ranks) and time.monotonic() < end:
            if any(rank.poll() not in (None, 0) for rank in ranks):
                end = min(end, time.monotonic() + 70)
            time.sleep(0.2)
        for rank in ranks:
            rank.kill()
            rank.wait()


@pytest.fixture(scope="session")
def results(tmp_path_factory):
    """Run everything once, whichever worker asks first; the others wait for it."""
    missing = [name for name in ("accelerate", "transformers", "peft") if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)} (pip install 'commhub-accelerate[test]')")
    shared = "PYTEST_XDIST_WORKER" in os.environ
    base = tmp_path_factory.getbasetemp().parent if shared else tmp_path_factory.mktemp("ranks")
    folder = base / "commhub-accelerate"
    try:
        folder.mkdir()
    except FileExistsError:
        end = time.monotonic() + 3 * LIMIT
        while not (folder / "done").exists() and time.monotonic() < end:
            time.sleep(0.5)
        return Results(folder)
    for phase, size in (("first", 2), ("second", 2), ("single", 1)):
        _launch(folder, phase, size)
    (folder / "done").touch()
    return Results(folder)


def same(one, other):
    """Whether two nests of dicts, tensors and plain values are equal, bit for bit."""
    import torch

    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    return one == other


@pytest.fixture(name="same")
def _same():
    return same
