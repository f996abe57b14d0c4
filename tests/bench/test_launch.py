"""What the launcher makes of ranks that end: which hooks run next, and what it says of the others. No ranks run."""

import contextlib
import io
import json
import subprocess
import sys

import pytest

from commhub.bench import _launch
from commhub.bench._board import Board
from commhub.bench._display import PlainProgress
from commhub.bench._options import Settings

DIED = "  rank      : 1 (local_rank: 1)\n  exitcode  : -11 (pid: 7)\n  rank      : 0\n  exitcode  : -15 (pid: 6)\n"
SETUP = {
    "kind": "setup",
    "parameters": 1,
    "text_bytes": 1,
    "world_size": 2,
    "device": "CPU",
    "backend": "gloo",
    "threads": 1,
}
STARTED, DONE = {"kind": "start"}, {"kind": "done", "validation_loss": 1.0}


@pytest.fixture
def launch(monkeypatch):
    """Launch hooks whose ranks do as told: by hook, the events of rank 0 and, where they end, the launcher's log."""

    def run(**ends):
        jobs = []

        @contextlib.contextmanager
        def launcher(_settings, folder, _lifeline):
            indexes = json.loads((folder / "job.json").read_text())["indexes"]
            jobs.append(indexes)
            with (folder / "events-0.jsonl").open("w") as events:
                print(json.dumps(SETUP), file=events)
                for index in indexes:
                    said, log = list(ends.values())[index]
                    for event in said:
                        print(json.dumps(event | {"index": index}), file=events)
                    if log is not None:
                        break
            (folder / "log").write_text(log or "")
            with subprocess.Popen([sys.executable, "-c", ""]) as process:
                yield process

        monkeypatch.setattr(_launch, "_launcher", launcher)
        board = Board(Settings(hooks=list(ends)), "command", PlainProgress(io.StringIO()))
        _launch.launch(board.settings, board)
        return jobs, [(result.status, result.error) for result in board.outcome().results]

    return run


def test_hooks_after_one_whose_ranks_died_get_a_new_launch_and_so_after_one_that_raised(launch):
    raised = {"kind": "failed", "error": "RuntimeError: no", "time": 1.0}
    jobs, results = launch(
        allreduce=([STARTED, DONE], None),
        fp16=([STARTED], DIED),
        bf16=([STARTED, DONE], None),
        noop=([STARTED, raised], "RuntimeError: an echo\n"),
        powersgd=([STARTED, DONE], None),
    )
    assert jobs == [[0, 1, 2, 3, 4], [2, 3, 4], [4]]
    assert results == [
        ("done", None),
        ("failed", "rank 1 was ended by SIGSEGV"),
        ("done", None),
        ("failed", "RuntimeError: no"),
        ("done", None),
    ]
