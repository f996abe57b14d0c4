"""What the launcher makes of ranks that end: which hooks run next, and what it says of the others. No ranks run."""

import contextlib
import io
import json

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
RACE, RACED = {"kind": "race", "hooks": 2}, {"kind": "raced"}
STARTED, DONE = {"kind": "start"}, {"kind": "done", "validation_loss": 1.0}


class Ended:
    def is_at_work(self):
        return False


@pytest.fixture
def launch(monkeypatch):
    """Launch hooks whose ranks do as told: by hook, the events of rank 0 and, where they end, the launcher's log."""

    def run(race_ends=None, **ends):
        jobs = []

        @contextlib.contextmanager
        def crew(_settings, folder, _lifeline, _hosts):
            job = json.loads((folder / "job.json").read_text())
            indexes = job["indexes"]
            jobs.append((indexes, job["raced"]))
            with (folder / "events-0.jsonl").open("w") as events:
                print(json.dumps(SETUP), file=events)
                for index in indexes:
                    said, log = list(ends.values())[index]
                    for event in said:
                        print(json.dumps(event | {"index": index}), file=events)
                    if log is not None:
                        break
                else:
                    log = race_ends
                    for event in [RACE, *([] if log else [RACED])]:
                        print(json.dumps(event), file=events)
            (folder / "log-0").write_text(log or "")
            yield Ended()

        monkeypatch.setattr(_launch, "crew", crew)
        board = Board(Settings(hooks=list(ends)), "command", PlainProgress(io.StringIO()))
        _launch.launch(board.settings, board)
        return jobs, [(result.status, result.error) for result in board.outcome().results], board.remarks

    return run


def test_hooks_after_one_whose_ranks_died_get_a_new_launch_and_so_after_one_that_raised(launch):
    raised = {"kind": "failed", "error": "RuntimeError: no", "time": 1.0}
    jobs, results, _ = launch(
        allreduce=([STARTED, DONE], None),
        fp16=([STARTED], DIED),
        bf16=([STARTED, DONE], None),
        noop=([STARTED, raised], "RuntimeError: an echo\n"),
        powersgd=([STARTED, DONE], None),
    )
    assert jobs == [([0, 1, 2, 3, 4], []), ([2, 3, 4], [0]), ([4], [0, 2])]
    assert results == [
        ("done", None),
        ("failed", "rank 1 was ended by SIGSEGV"),
        ("done", None),
        ("failed", "RuntimeError: no"),
        ("done", None),
    ]


def test_hooks_are_timed_by_fresh_ranks_where_the_last_one_failed(launch):
    jobs, results, remarks = launch(fp16=([STARTED, DONE], None), noop=([STARTED], DIED))
    assert jobs == [([0, 1], []), ([], [0])]
    assert [status for status, _ in results] == ["done", "failed"]
    assert remarks == []


def test_ranks_that_die_while_steps_are_timed_leave_what_was_trained(launch):
    jobs, results, remarks = launch(race_ends=DIED, fp16=([STARTED, DONE], None), bf16=([STARTED, DONE], None))
    assert jobs == [([0, 1], [])]
    assert results == [("done", None), ("done", None)]
    assert remarks == ["Steps could not be timed in turn: rank 1 was ended by SIGSEGV."]
