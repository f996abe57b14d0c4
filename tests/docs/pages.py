"""The pages of the guides as scripts: run on ranks, and what they leave behind compared."""

import json
import os
import re
import subprocess
import sys
from importlib import util
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
LIMIT = 400
"""Seconds after which a script is ended; it takes a tenth of that."""


def needs(package):
    return pytest.mark.skipif(util.find_spec(package) is None, reason=f"{package} is not installed here")


def blocks(page, language):
    text = (DOCS / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.S | re.M)


def script(page, folder, before="", after=""):
    """A page's Python blocks as one script; it leaves a file behind where it has come to its end."""
    lines = [before, *blocks(page, "python"), after, "import os, pathlib"]
    lines.append("pathlib.Path('ended-' + os.environ.get('RANK', 'driver')).touch()")
    path = folder / "train.py"
    path.write_text("\n".join(lines))
    return path


def run(*command, folder, **environment):
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("TORCHELASTIC", "SLURM", "PYTEST"))}
    kept |= {"OMP_NUM_THREADS": "1", **environment}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, cwd=folder, env=kept, **pipes)
    try:
        said = process.communicate(timeout=LIMIT)
    except subprocess.TimeoutExpired:
        process.terminate()  # a launcher ends its ranks then, which are in sessions of their own
        said = process.communicate()
    return subprocess.CompletedProcess(command, process.returncode, *said)


def torchrun(*arguments, folder, **environment):
    return run(sys.executable, "-m", "torch.distributed.run", *map(str, arguments), folder=folder, **environment)


def on_two_ranks(path, *arguments):
    options = ("--nproc-per-node", 2, "--standalone", "--local-addr", "127.0.0.1")
    return torchrun(*options, path, *arguments, folder=path.parent)


def without_loss(line):
    return re.sub(r"loss \d\.\d{3}", "loss", line)


def hook_states(folder):
    """What ``Registration.save`` has left in a folder, by rank."""
    ranks = json.loads((folder / "commhub.json").read_text())["ranks"]
    return [torch.load(folder / one["file"], weights_only=True) for one in ranks]


def assert_same(whole, resumed):
    """Raise unless two nests are equal bit for bit, and hold states of hooks that are something and differ by rank."""
    for part in whole:
        assert _same(whole[part], resumed[part]), part
    first, second = (one["local"] for one in whole["hook"])
    assert [_size(one) > 0 for one in (first, second)] == [True, True]
    assert not _same(list(first.values()), list(second.values()))


def _same(one, other):
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(value, other[key]) for key, value in one.items())
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    return one == other


def _size(state):
    if isinstance(state, torch.Tensor):
        return float(state.abs().sum())
    return sum(map(_size, state.values())) if isinstance(state, dict) else 0.0
