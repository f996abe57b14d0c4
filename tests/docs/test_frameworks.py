"""The guides to frameworks: their scripts run with the real packages, and go on in new processes.

Packages that are not installed leave their tests out, with that reason.
"""

import subprocess
import sys

import torch

from .pages import assert_same, blocks, hook_states, needs, on_two_ranks, run, script, without_loss

SEVERAL = """
import os, runpy, sys
script, *runs = sys.argv[1:]
for run in runs:
    folder, _, argument = run.partition(":")
    os.makedirs(folder, exist_ok=True)
    os.chdir(folder)
    sys.argv = [script, argument]
    runpy.run_path(script, run_name="__main__")
    os.chdir("..")
"""


def resumed(page, folder, launch, half, end, before=""):
    """A page's script, run to its end in ``whole``; and in ``resumed`` halfway, and from there in new processes.

    Args:
        launch: starts a path with arguments, and returns what has ended.
        half, end: what the script is told.
        before: what it begins with.

    Returns:
        What the two generations of processes have printed.
    """
    train, several = script(page, folder, before), folder / "several.py"
    several.write_text(SEVERAL)
    said = []
    for runs in ([f"whole:{end}", f"resumed:{half}"], [f"resumed:{end}"]):
        for left in folder.glob("*/ended-*"):
            left.unlink()
        done = launch(several, train, *runs)
        ended = {path.parent.name for path in folder.glob("*/ended-*")}
        assert ended == {run.partition(":")[0] for run in runs}, (done.stdout + done.stderr)[-6000:]
        said.append(done.stdout)
    shown = [line for line in "".join(blocks(page, "console")).splitlines() if not line.startswith("$")]
    printed = [without_loss(line) for line in "".join(said).splitlines()]
    assert [line for line in shown if without_loss(line) not in printed] == []
    return said


def _said(done):
    return [each.stdout for each in done], [each.stderr for each in done]


@needs("ignite")
def test_the_ignite_page_resumes_in_new_processes_bit_by_bit(tmp_path):
    def launch(path, train, *runs):
        done = [on_two_ranks(path, train, each) for each in runs]  # a process group each
        return subprocess.CompletedProcess([], 0, *("".join(text) for text in _said(done)))

    resumed("frameworks-ignite.md", tmp_path, launch, 1, 2)
    ends = []
    for name in ("whole", "resumed"):
        folder = tmp_path / name / "checkpoints"
        saved = torch.load(folder / "checkpoint_10.pt", weights_only=True)
        ends.append({**saved, "hook": hook_states(folder / "hook-10")})
    assert_same(*ends)
    assert ends[0].keys() == {"model", "optimizer", "trainer", "hook"}


DDP = """
import torch
import torch.distributed as dist
dist.init_process_group("gloo")
model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(8, 8))
"""


@needs("tensorboard")
def test_tensorboard_has_the_figures_of_each_step(tmp_path):
    done = on_two_ranks(script("frameworks-logging.md", tmp_path, DDP, "dist.destroy_process_group()"))
    assert sorted(path.name for path in tmp_path.glob("ended-*")) == ["ended-0", "ended-1"], done.stderr[-4000:]
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "runs"))
    events.Reload()
    sent = [event.value for event in events.Scalars("commhub/sent_bytes")]
    assert sent == [2 * 1 / 2 * (8 * 8 + 8) * 2] * 4  # two bytes an element, on two ranks
    assert [event.value for event in events.Scalars("commhub/compression")] == [2.0] * 4


@needs("ray")
def test_the_ray_page_resumes_in_a_new_driver_bit_by_bit(tmp_path):
    def launch(path, *arguments):
        return run(sys.executable, *map(str, (path, *arguments)), folder=tmp_path)

    before = "import ray\nray.init(num_cpus=4, include_dashboard=False, ignore_reinit_error=True)\n"
    resumed("frameworks-ray.md", tmp_path, launch, 5, 8, before)
    ends = []
    for name in ("whole", "resumed"):
        found = sorted((tmp_path / name / "results/commhub").glob("checkpoint_*/model.pt"))
        assert len(found) == {"whole": 1, "resumed": 2}[name]
        files = {part: found[-1].parent / f"{part}.pt" for part in ("model", "optimizer", "hook-0", "hook-1")}
        state = {part: torch.load(file, weights_only=True) for part, file in files.items()}
        hook = [state.pop("hook-0"), state.pop("hook-1")]
        ends.append({**state, "hook": hook})
    assert_same(*ends)
