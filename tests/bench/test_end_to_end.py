"""Whole benches on two real ranks: figures, failures, Ctrl-C, torchrun.

A launch costs some ten seconds of CPU. Without COMMHUB_EVERY_CHECK there are two: one of a bench whose last hook dies,
one that Ctrl-C ends. With it, a hook that raises and the hooks after it take another, and torchrun two more.
"""

import os
import re
import signal
import sys
import time

import pytest

EVERYTHING = bool(os.environ.get("COMMHUB_EVERY_CHECK"))
HOOKS = ("allreduce", "fp16", *(["bench_raises"] if EVERYTHING else []), "allreduce", "bench_dies")
SHORT = ("--batch", "2", "--steps", "6", "--warmup", "2", "--repeats", "3", "--threads", "1")
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d",
            "--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1")  # fmt: skip


def losses(hook):
    return [step["loss"] for step in hook["steps"]]


def wait_for_steps(process, count):
    """Read stderr until so many progress lines came."""
    while count:
        line = process.stderr.readline()
        assert line, "the bench ended early"
        count -= " step " in line


@pytest.fixture(scope="module")
def run(bench):
    """One bench of good and bad hooks on an emulated link."""
    return bench("--hooks", ",".join(HOOKS), *SHORT, "--bandwidth", "200mbit", "--latency", "1ms", "--json", "out.json",
                 "--report", "out.html")  # fmt: skip


def test_a_failing_hook_gets_a_row_and_the_others_still_run(run, bench):
    assert run.returncode == 1
    statuses = [hook["status"] for hook in bench.json()["hooks"]]
    assert statuses == ["failed" if "bench" in hook else "done" for hook in HOOKS], run.stdout + run.stderr
    *raised, died = (hook["error"] for hook in bench.json()["hooks"] if hook["error"])
    assert "SIGSEGV" in died
    for hook in HOOKS:
        assert (f"{hook}: failed after 2 steps" in run.stdout) == ("bench" in hook)
    assert len(raised) == EVERYTHING
    assert all("RuntimeError: no more" in error for error in raised)


def test_hooks_train_the_same_model_on_the_same_batches(run, bench):
    first, half, *raised, again, _ = bench.json()["hooks"]
    assert losses(first) == losses(again)
    assert first["validation_loss"] == again["validation_loss"]
    assert all(losses(first)[:2] == losses(hook) for hook in raised)
    assert losses(half) == pytest.approx(losses(first), abs=1e-2)
    assert losses(first)[0] == pytest.approx(5.545, abs=0.2)
    assert losses(first)[-1] < losses(first)[0] - 0.2


def test_bytes_and_times_are_what_was_asked_for(run, bench):
    document = bench.json()
    first, half, *_ = document["hooks"]
    assert first["sent_bytes_per_step"] == document["setup"]["parameters"] * 4
    assert (first["compression"], half["compression"]) == (1.0, 2.0)
    # 3.5 MB at 200 mbit/s take 140 ms; half of it 70 ms.
    assert first["step_seconds"] > 0.14
    assert half["step_seconds"] > 0.07
    for hook in (first, half):
        assert sum(hook["split_seconds"].values()) == pytest.approx(hook["step_seconds"])
        assert hook["split_seconds"]["wait"] > 0.02
    assert first["speedup"] == 1.0


def test_output_is_a_table_with_the_emulation_named(run):
    lines = run.stdout.strip().splitlines()
    assert lines[0].split()[:2] == ["hook", "loss"]
    assert "The link is emulated (200mbit, 1ms)" in run.stdout
    assert lines[-2:] == ["JSON: out.json", "Report: out.html"]
    assert "link emulated: 200mbit, 1ms" in run.stderr
    assert "Traceback" not in run.stderr


def test_nothing_is_left_behind(run, bench):
    assert bench.processes() == []
    ours = ("commhub", "torchelastic")  # torch keeps a cache folder of its own
    assert [x for x in bench.temporary.iterdir() if x.name.startswith(ours)] == []
    text = (bench.folder / "out.html").read_text()
    assert str(bench.temporary) not in text


@pytest.mark.skipif(not EVERYTHING, reason="a launch more: .ci/run sets COMMHUB_EVERY_CHECK")
def test_a_model_that_is_sharded(bench):
    hooks = "allreduce,powersgd_rank2,optimizer_overlap"
    flags = ("--hooks", hooks, "--shard", "2", "--nproc", "4", *SHORT, "--json", "sharded.json", "--no-report")
    done = bench(*flags)
    plain, powersgd, refused = bench.json("sharded.json")["hooks"]
    assert [hook["status"] for hook in (plain, powersgd, refused)] == ["done", "done", "failed"], done.stderr
    assert "steps the optimizer in backward" in refused["error"]
    assert powersgd["sent_bytes_per_step"] < 0.5 * plain["sent_bytes_per_step"]
    assert abs(powersgd["validation_loss"] - plain["validation_loss"]) < 0.5


@pytest.mark.skipif(not EVERYTHING, reason="a launch more: .ci/run sets COMMHUB_EVERY_CHECK")
def test_a_model_that_is_sharded_over_all_ranks(bench):
    hooks = "allreduce,quantize_per_channel,powersgd_rank2"
    flags = ("--hooks", hooks, "--shard", "2", "--nproc", "2", *SHORT, "--json", "inside.json", "--no-report")
    done = bench(*flags)
    plain, quantized, refused = bench.json("inside.json")["hooks"]
    assert [hook["status"] for hook in (plain, quantized, refused)] == ["done", "done", "failed"], done.stderr
    assert "has no reduce_scatter" in refused["error"]
    assert quantized["sent_bytes_per_step"] < 0.3 * plain["sent_bytes_per_step"]
    assert abs(quantized["validation_loss"] - plain["validation_loss"]) < 0.05


@pytest.mark.skipif(not EVERYTHING, reason="a launch more: .ci/run sets COMMHUB_EVERY_CHECK")
def test_torchrun_runs_the_same_job_failing_hooks_included(run, bench):
    flags = ("--hooks", "allreduce,bench_raises,fp16", *SHORT, "--json", "torchrun.json", "--no-report")
    done = bench(*flags, launcher=TORCHRUN)
    first, raised, half = bench.json("torchrun.json")["hooks"]
    assert [hook["status"] for hook in (first, raised, half)] == ["done", "failed", "done"], done.stderr
    assert "no more" in raised["error"]
    assert losses(first) == losses(bench.json()["hooks"][0])
    assert losses(half) == losses(bench.json()["hooks"][1])
    assert done.returncode == 1
    assert done.stdout.count("Speed-up is against allreduce.") == 1


@pytest.mark.parametrize(
    "launcher", [pytest.param((), id="alone"), *([pytest.param(TORCHRUN, id="torchrun")] if EVERYTHING else [])]
)
def test_ctrl_c_ends_all_ranks_and_keeps_what_was_measured(bench, launcher):
    flags = ("--hooks", "allreduce,fp16", "--batch", "2", "--steps", "20", "--warmup", "1", "--latency", "300ms")
    process = bench.start(*flags, "--json", "stopped.json", "--report", "stopped.html", launcher=launcher)
    wait_for_steps(process, 1)
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert time.monotonic() - began < 20
    assert bench.processes() == []
    first, second = bench.json("stopped.json")["hooks"]
    assert (first["status"], second["status"]) == ("interrupted", "not run")
    assert 4 <= len(first["steps"]) < 20
    assert first["step_seconds"] > 0.3
    assert re.search(r"allreduce: stopped after \d+ steps", out)
    assert (bench.folder / "stopped.html").exists()
    if not launcher:
        assert process.returncode == 130
