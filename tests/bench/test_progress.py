"""Progress is a few plain lines where output is kept, and a live line per hook on a terminal."""

import io

import pytest

from commhub.bench._board import Board
from commhub.bench._display import PlainProgress, make_progress
from commhub.bench._options import Settings

SETUP = {
    "kind": "setup",
    "torch": "2.13.0",
    "device": "CPU",
    "backend": "gloo",
    "world_size": 2,
    "machines": 1,
    "threads": 1,
    "parameters": 873_216,
    "text_bytes": 12_000_000,
}


def step_event(index, step):
    record = dict.fromkeys(("loss", "seconds", "encode", "wait", "decode", "reference_bytes"), 0.5)
    return {"kind": "step", "index": index, "record": record | {"step": step, "sent_bytes": 1e6}}


def play(progress, *, steps=10):
    """Two hooks, of which the second fails in its third step."""
    board = Board(Settings(hooks=["allreduce", "fp16"], steps=steps, bandwidth="1gbit"), "command", progress)
    board.on_event(SETUP)
    board.on_event({"kind": "start", "index": 0})
    for step in range(steps):
        board.on_event(step_event(0, step))
    board.on_event({"kind": "done", "index": 0, "validation_loss": 0.4})
    board.on_event({"kind": "start", "index": 1})
    board.on_event(step_event(1, 0))
    board.on_event({"kind": "failed", "index": 1, "error": "HookError: gone"})
    board.close()
    return board


def test_plain_lines_are_few_and_complete():
    stream = io.StringIO()
    play(PlainProgress(stream))
    lines = stream.getvalue().splitlines()
    assert "873 k parameters" in lines[0]
    assert "emulated: 1gbit" in lines[1]
    assert lines[2] == "allreduce  step 2/10  loss 0.500  500 ms/step  sent 2.00 MB"
    assert lines[6] == "allreduce  step 10/10  loss 0.500  500 ms/step  sent 10.0 MB"
    assert lines[7:] == ["fp16  failed: HookError: gone"]


def test_few_steps_get_a_line_each():
    stream = io.StringIO()
    play(PlainProgress(stream), steps=6)
    assert sum(line.startswith("allreduce") for line in stream.getvalue().splitlines()) == 5


def test_a_terminal_gets_a_live_line_per_hook(monkeypatch):
    pytest.importorskip("rich", reason="live progress is part of the bench extra")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    stream = io.StringIO()
    stream.isatty = lambda: True
    progress = make_progress(stream)
    assert type(progress).__name__ == "LiveProgress"
    play(progress)
    last = [line for line in stream.getvalue().splitlines() if "/10" in line][-2:]
    assert "10/10" in last[0]
    assert "loss 0.500  500 ms/step  sent 10.0 MB" in last[0]
    assert "failed: HookError: gone" in last[1]


def test_a_terminal_without_rich_gets_plain_lines(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "rich.console", None)
    monkeypatch.delitem(__import__("sys").modules, "commhub.bench._live", raising=False)
    stream = io.StringIO()
    stream.isatty = lambda: True
    assert isinstance(make_progress(stream), PlainProgress)


def test_the_board_keeps_what_was_measured_at_any_moment():
    board = play(PlainProgress(io.StringIO()))
    done, failed = board.outcome().results
    assert (done.status, len(done.records), done.validation_loss) == ("done", 10, 0.4)
    assert (failed.status, len(failed.records), failed.error) == ("failed", 1, "HookError: gone")
    assert board.todo() == ([], [0])
    assert board.running() is None


def timed_event(index, repeat):
    names = ("seconds", "cpu_seconds", "encode", "wait", "decode", "wire", "busy", "sent_bytes", "reference_bytes")
    return {"kind": "timed", "index": index, "record": {"repeat": repeat, **dict.fromkeys(names, 0.5)}}


def time_in_turn(progress, end, *, steps=10):
    """Both hooks of a bench that trains with ``steps`` under each, and a step without communication."""
    board = Board(Settings(hooks=["allreduce", "fp16"], steps=steps, warmup=0, repeats=10), "command", progress)
    board.on_event(SETUP)
    for index in range(2 if steps else 0):
        board.on_event({"kind": "start", "index": index})
        board.on_event({"kind": "done", "index": index, "validation_loss": 0.4})
    board.on_event({"kind": "race", "hooks": 3})
    for repeat in range(10):
        for index in (0, -1, *([1] if repeat < 2 else [])):
            board.on_event(timed_event(index, repeat))
        if repeat == 1:
            board.on_event({"kind": "dropped", "index": 1, "error": "HookError: gone"})
    board.on_event(end)
    return board


RACED = {"kind": "raced"}


@pytest.mark.parametrize("steps", [0, 10])
def test_steps_in_turn_are_shown_and_kept_apart_from_training(steps):
    stream = io.StringIO()
    outcome = time_in_turn(PlainProgress(stream), RACED, steps=steps).outcome()
    kept, dropped = outcome.results
    assert [len(kept.race), len(dropped.race), len(outcome.floor)] == [10, 0, 10]
    assert kept.status == "done"
    # Where nothing was trained, that is all there is of it.
    assert (dropped.status, dropped.error) == (("done", None) if steps else ("failed", "HookError: gone"))
    assert outcome.remarks == ("fp16 failed while steps were timed: HookError: gone.",)
    lines = [line for line in stream.getvalue().splitlines() if line.startswith("timing")]
    assert lines[0] == "timing steps in turn: 10 of each of 3 hooks, in shuffled order"
    assert lines[1:] == [f"timing steps in turn  {n}/30" for n in (6, 12, 18)]


@pytest.mark.parametrize("steps", [0, 10])
def test_what_was_timed_when_ranks_died_does_not_count(steps):
    end = {"kind": "race failed", "error": "rank 1 was ended by SIGSEGV"}
    outcome = time_in_turn(PlainProgress(io.StringIO()), end, steps=steps).outcome()
    assert all(result.race == () for result in outcome.results)
    assert outcome.remarks[-1] == "Steps could not be timed in turn: rank 1 was ended by SIGSEGV."
    assert [result.status for result in outcome.results] == (["done"] * 2 if steps else ["failed"] * 2)


def test_a_step_without_communication_is_the_floor_where_a_hook_is_that_too():
    board = Board(Settings(hooks=["noop"], steps=0), "command", PlainProgress(io.StringIO()))
    board.on_event(SETUP)
    for event in ({"kind": "race", "hooks": 1}, timed_event(0, 0), RACED):
        board.on_event(event)
    assert board.outcome().floor == board.outcome().results[0].race != ()
