"""The Python blocks of the guides and of this package's page run on two real ranks, as one script each.

The guides' scripts go on from a checkpoint. Each is run to its end; and halfway, and from there on in new processes.
"""

import json
import re
from importlib import util
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[3]
LIGHTNING, FABRIC = ROOT / "docs/frameworks-lightning.md", ROOT / "docs/frameworks-fabric.md"
README = ROOT / "plugins/commhub-lightning/README.md"
PACKAGES = ["lightning", "pytorch_lightning"]
RUNS = {"lightning": [(LIGHTNING, "2", "4"), (FABRIC, "5", "8")], "pytorch_lightning": [(LIGHTNING, "2", "4")]}
"""By package: pages, and how far their scripts are to train at first and in the end."""


@pytest.fixture(scope="module", params=PACKAGES)
def played(request, tmp_path_factory, start):
    """The package, the folder in which everything has run, and how the processes ended."""
    package = request.param
    if util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed here")
    folder = tmp_path_factory.mktemp(package)
    runs = [f"{page.stem}-{name}:{to}:{page}" for page, *ends in RUNS[package] for name, to in _named(ends)]
    runs += [f"readme::{README}"] if package == "lightning" else []
    ended = start("page.py", package, folder, *runs, ranks=2, logs=folder)
    rest = [f"{page.stem}-resumed:{end}:{page}" for page, _, end in RUNS[package]]
    ended += start("page.py", package, folder, *rest, ranks=2, logs=folder)
    return package, folder, ended


def _named(ends):
    half, end = ends
    return ("whole", end), ("resumed", half)


def test_the_blocks_of_the_pages_run(played):
    package, folder, ended = played
    expected = {f"{page.stem}-whole/told-{end}": page for page, _, end in RUNS[package]}
    expected |= {f"{page.stem}-resumed/told-{to}": page for page, *ends in RUNS[package] for to in ends}
    expected |= {"readme/told-": README} if package == "lightning" else {}
    for told, page in expected.items():
        blocks = page.read_text(encoding="utf-8").count("```python\n")
        files = [folder / f"{told}-{rank}" for rank in range(2)]
        assert all(file.exists() for file in files), ended
        assert [file.read_text() for file in files] == [str(blocks)] * 2


def _lightning(folder):
    """What a run of the page about Lightning has left: parameters, optimizer, and the hook's state on each rank."""
    (path,) = (folder / "checkpoints").glob("last*.ckpt")
    found = torch.load(path, weights_only=True)
    return {"model": found["state_dict"], "optimizer": found["optimizer_states"], "hook": found["commhub"]["ranks"]}


def _fabric(folder):
    path = folder / "checkpoints" / (folder / "checkpoints/latest").read_text()
    ranks = json.loads((path / "hook/commhub.json").read_text())["ranks"]
    hook = [torch.load(path / "hook" / one["file"], weights_only=True) for one in ranks]
    return {**torch.load(path / "train.ckpt", weights_only=True), "hook": hook}


def test_a_run_that_goes_on_in_new_processes_ends_as_one_that_was_not_interrupted_bit_by_bit(played):
    package, folder, _ = played
    for page, _, _ in RUNS[package]:
        read = _lightning if page is LIGHTNING else _fabric
        whole, resumed = read(folder / f"{page.stem}-whole"), read(folder / f"{page.stem}-resumed")
        assert whole.keys() == {"model", "optimizer", "hook"}
        for part in whole:
            assert _same(whole[part], resumed[part]), (page.stem, part)
        first, second = (one["local"] for one in whole["hook"])
        assert [_size(one) > 0 for one in (first, second)] == [True, True]
        assert not _same(list(first.values()), list(second.values()))


def test_the_scripts_print_what_their_pages_show(played):
    package, folder, _ = played
    for page, half, end in RUNS[package]:
        (shown,) = re.findall(r"^```console\n(\$ python train.py .*?)^```$", page.read_text("utf-8"), re.S | re.M)
        said = [(folder / f"{page.stem}-resumed/said-{to}-0").read_text().splitlines()[-1] for to in (half, end)]
        lines = [line for line in shown.splitlines() if line.startswith("step")]
        assert [_without_loss(line) for line in lines] == [_without_loss(line) for line in said]


def _without_loss(line):
    return re.sub(r"loss \d\.\d{3}", "loss", line)


def _same(one, other):
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(value, other[key]) for key, value in one.items())
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    return one == other


def _size(state):
    """The sum of all absolute values."""
    if isinstance(state, torch.Tensor):
        return float(state.abs().sum())
    return sum(map(_size, state.values())) if isinstance(state, dict) else 0.0
