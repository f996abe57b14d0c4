"""The figures, the table, the closing sentence and the JSON file say what was measured, and nothing else."""

import json
import math

import pytest

from commhub.bench import _format
from commhub.bench._document import document
from commhub.bench._finish import finish
from commhub.bench._table import HEADER, notes, table
from commhub.bench._verdict import verdict


def test_warm_up_steps_count_for_the_loss_and_not_for_the_times(make_result):
    result = make_result(times=(9.0, 9.0, 0.1, 0.2, 0.3))
    assert result.step_seconds == 0.2
    assert len(result.records) == 5
    assert result.curve()[0][-1] == pytest.approx(18.6)


def test_the_parts_of_a_step_add_up_to_its_median(make_result):
    split = make_result(times=(0.2, 0.2, 0.1, 0.4, 0.3)).split
    assert list(split) == ["compute", "encode", "wait", "decode"]
    assert sum(split.values()) == pytest.approx(0.3)


def test_compression_is_against_a_plain_all_reduce(make_result):
    assert make_result(compression=4.0).compression == pytest.approx(4.0)
    assert make_result(compression=None).compression == math.inf
    assert make_result(times=()).compression is None


def test_speed_up_is_against_allreduce_else_against_the_first(make_result, make_outcome):
    slow, fast = make_result("fp16", (0.4,) * 8), make_result("allreduce", (0.2,) * 8)
    outcome = make_outcome(slow, fast)
    assert outcome.baseline is fast
    assert outcome.speedup(slow) == 0.5
    assert "Speed-up is against allreduce." in notes(outcome)
    outcome = make_outcome(slow, make_result("bf16", (0.1,) * 8))
    assert outcome.baseline is slow
    assert "Speed-up is against fp16, the first hook, because allreduce was not run." in notes(outcome)


def test_the_table_is_aligned_text_with_a_row_for_each_hook(make_result, make_outcome):
    outcome = make_outcome(
        make_result("allreduce", (0.2,) * 8),
        make_result("powersgd(rank=4)", (0.0512,) * 8, compression=20.0, loss=3.25),
        make_result("fp16", (), status="failed", error="HookError: gone", loss=None),
        make_result("bf16", (0.1,) * 3, status="interrupted", loss=None),
        make_result("noop", (), status="not run", loss=None),
    )
    lines = table(outcome).splitlines()
    assert all(name in lines[0] for name in HEADER)
    assert set(lines[1]) == {"-"}
    assert lines[3].split() == ["powersgd(rank=4)", "4.125", "3.250", "51.2", "ms", "50.0", "kB", "20.0x", "3.91x"]
    assert len({len(line) for line in lines[:4]}) == 1
    assert lines[4].split() == ["fp16", *"------"]
    assert lines[7:] == [
        "fp16: failed after 0 steps: HookError: gone",
        "bf16: stopped after 3 steps",
        "noop: not run",
    ]


def test_an_emulated_link_is_named(make_result, make_outcome):
    outcome = make_outcome(make_result(), link="100mbit, 1ms", bandwidth="100mbit", latency="1ms")
    assert any("The link is emulated (100mbit, 1ms)" in note for note in notes(outcome))


@pytest.mark.parametrize(
    ("hooks", "link", "sentence"),
    [
        (
            [("powersgd", 0.1, 20.0)],
            "10mbit",
            "On this emulated link powersgd is the fastest, 2.00x as fast as allreduce.",
        ),
        (
            [("powersgd", 0.25, 20.0)],
            "10gbit",
            "On this emulated link powersgd is 0.80x as fast as allreduce: compression does not pay here.",
        ),
        (
            [("fp16", 0.1, 2.0), ("powersgd", 0.25, 20.0), ("bf16", 0.199, 2.0)],
            "",
            "On this machine fp16 is the fastest, 2.00x as fast as allreduce; powersgd is 0.80x and bf16 is 1.01x "
            "as fast as allreduce: compression does not pay here.",
        ),
        ([("allreduce", 0.2, 1.0)], "", "On this machine no hook is measurably faster than allreduce."),
        ([("noop", 0.1, None)], "", ""),
        ([], "", ""),
    ],
)
def test_the_closing_sentence_follows_from_the_numbers(make_result, make_outcome, hooks, link, sentence):
    others = [make_result(hook, (time,) * 8, compression=factor) for hook, time, factor in hooks]
    assert verdict(make_outcome(make_result(), *others, link=link)) == sentence


def test_a_speed_up_within_the_scatter_is_not_called_one(make_result, make_outcome):
    base = make_result(times=(0.2, 0.2, 0.15, 0.25, 0.15, 0.25, 0.2))
    other = make_result("fp16", (0.2, 0.2, 0.13, 0.23, 0.13, 0.23, 0.18), compression=2.0)
    assert verdict(make_outcome(base, other)).startswith(
        "On this machine the step times of fp16 scatter too much to tell"
    )


def test_a_slow_down_beyond_the_scatter_is_one_all_the_same(make_result, make_outcome):
    base = make_result(times=(0.2, 0.2, *(0.15, 0.25, 0.15, 0.25, 0.2) * 2))
    other = make_result("fp16", (0.2, 0.2, *(0.35, 0.45, 0.35, 0.45, 0.40) * 2), compression=2.0)
    assert "fp16 is 0.50x as fast as allreduce: compression does not pay" in verdict(make_outcome(base, other))


@pytest.mark.parametrize("slow", [0.6, 0.05])
def test_of_a_few_scattered_steps_nothing_is_concluded(make_result, make_outcome, slow):
    base = make_result(times=(0.2, 0.2, 0.15, 0.25, 0.15, 0.25, 0.2))
    other = make_result("fp16", (slow,) * 7, compression=2.0)
    assert "the step times of fp16 scatter too much to tell" in verdict(make_outcome(base, other))


def test_a_faster_hook_with_a_worse_loss_is_called_so(make_result, make_outcome):
    outcome = make_outcome(make_result(), make_result("powersgd", (0.1,) * 8, compression=20.0, loss=3.2))
    assert verdict(outcome).endswith("2.00x as fast as allreduce, at a held-out loss 0.200 higher after as many steps.")


def test_a_hook_that_sends_nothing_is_called_a_floor(make_result, make_outcome):
    outcome = make_outcome(make_result(), make_result("noop", compression=None))
    assert any("noop sends nothing" in note for note in notes(outcome))


def test_json_holds_every_step_and_no_nan(make_result, make_outcome):
    diverged = make_result("fp16", compression=None, loss=math.nan)
    made = json.loads(json.dumps(document(make_outcome(make_result(), diverged)), allow_nan=False))
    assert made["schema"] == 1
    assert made["baseline"] == "allreduce"
    assert made["emulated_link"] is None
    assert set(made) == {
        "schema", "command", "settings", "machine", "setup", "emulated_link", "link", "remarks", "baseline", "hooks",
    }  # fmt: skip
    first, second = made["hooks"]
    assert set(first) == {
        "hook", "ran_as", "status", "error", "loss", "validation_loss", "step_seconds", "step_seconds_quartiles",
        "sent_bytes_per_step", "compression", "speedup", "split_seconds", "limits", "timed_steps", "steps",
    }  # fmt: skip
    assert len(first["steps"]) == 8
    assert set(first["steps"][0]) == {
        "step", "loss", "seconds", "encode", "wait", "decode", "sent_bytes", "reference_bytes",
    }  # fmt: skip
    assert (second["compression"], second["validation_loss"]) == (None, None)


def test_a_loss_that_diverged_is_not_taken_for_one_that_was_not_measured(make_result, make_outcome):
    outcome = make_outcome(make_result(loss=math.nan), make_result("fp16", (), status="not run", loss=None))
    diverged, not_run = table(outcome).splitlines()[2:4]
    assert diverged.split()[2] == "nan"
    assert not_run.split()[2] == "-"


def test_a_stopped_bench_without_a_step_leaves_earlier_files_alone(make_result, make_outcome, tmp_path, capsys):
    file = tmp_path / "out.json"
    file.write_text("earlier")
    outcome = make_outcome(make_result(times=(), status="not run"), json=str(file))
    assert finish(outcome, stopped=130) == 130
    assert (file.read_text(), capsys.readouterr().out) == ("earlier", "Nothing was measured.\n")


def test_the_exit_code_tells_of_failures(make_result, make_outcome, tmp_path, capsys):
    failed = make_result("fp16", status="failed", error="no")
    assert finish(make_outcome(make_result(), report=""), stopped=0) == 0
    assert finish(make_outcome(make_result(), failed, report=""), stopped=0) == 1
    assert finish(make_outcome(make_result(), json=str(tmp_path / "no" / "x"), report=""), stopped=0) == 1
    assert "could not be written" in capsys.readouterr().err


def test_without_matplotlib_a_note_says_what_to_install(make_result, make_outcome, capsys):
    finish(make_outcome(make_result()), stopped=0)
    assert "No report: the report needs matplotlib: pip install commhub[bench]" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (_format.seconds(0.0871), "87.1 ms"),
        (_format.seconds(1.416), "1.42 s"),
        (_format.seconds(0.0001), "0.10 ms"),
        (_format.seconds(None), "-"),
        (_format.size(0), "0 B"),
        (_format.size(999.6), "1.00 kB"),
        (_format.size(3_360_000), "3.36 MB"),
        (_format.size(25e9), "25.0 GB"),
        (_format.count(840_448), "840 k"),
        (_format.times(math.inf), "inf"),
        (_format.times(20.04), "20.0x"),
        (_format.loss(2.34567), "2.346"),
    ],
)
def test_numbers_are_written_for_people(text, expected):
    assert text == expected
