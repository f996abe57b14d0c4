"""Whole benches on hosts of their own: what goes over their links, and what is left of them whatever ends the bench."""

import os
import shutil
import signal
import time

import pytest

EVERYTHING = bool(os.environ.get("COMMHUB_EVERY_CHECK"))
SHORT = ("--batch", "2", "--steps", "0", "--threads", "1", "--no-report")
pytestmark = [
    pytest.mark.skipif(not EVERYTHING, reason="some launches of ten seconds: .ci/run sets COMMHUB_EVERY_CHECK"),
    pytest.mark.usefixtures("hosts_can_be_made"),
]


@pytest.fixture(scope="module")
def run(hosts_can_be_made, bench):
    """One bench of two hosts on links of 200 mbit/s, with an emulated latency where the kernel has none."""
    flags = ("--hosts", "2", "--bandwidth", "200mbit", "--repeats", "6", "--json", "hosts.json", "--timeline", "t.json")
    return bench("--hooks", "allreduce,fp16,bench_tells,torch:fp16", *SHORT, *flags)


def test_bytes_at_the_interface_are_those_accounted(run, bench):
    document = bench.json("hosts.json")
    plain, half, tells, theirs = document["hooks"]
    assert (document["link"]["hosts"], document["link"]["bits_per_second"]) == (2, 200e6), run.stderr
    assert document["setup"]["machines"] == 2
    assert plain["sent_bytes_per_step"] == document["setup"]["parameters"] * 4
    assert theirs["sent_bytes_per_step"] == half["sent_bytes_per_step"]
    for hook in (plain, half, theirs):
        assert hook["limits"]["interface_bytes"] == pytest.approx(hook["sent_bytes_per_step"], rel=0.05)
        # Nothing is faster than its link.
        assert min(step["seconds"] for step in hook["timed_steps"]) > 0.95 * hook["sent_bytes_per_step"] / 25e6
    assert "the hosts are (0, 1)" in tells["error"]


def test_the_table_says_what_the_link_was(run):
    assert "The link: between 2 hosts on this machine: 200mbit" in run.stdout
    assert "interface" in run.stdout
    assert "bench_tells failed while steps were timed" in run.stdout
    assert run.returncode == 1


def test_the_timeline_is_written(run, bench):
    assert "Timeline: t.json" in run.stdout
    assert bench.json("t.json")["traceEvents"]


def test_nothing_is_left_of_them(run, bench):
    assert bench.processes() == []


def test_four_ranks_on_two_hosts_with_training(bench):
    flags = ("--hosts", "2", "--nproc", "4", "--bandwidth", "200mbit", "--batch", "1", "--steps", "4", "--warmup", "1")
    done = bench("--hooks", "bench_tells,allreduce", *flags, "--threads", "1", "--repeats", "2", "--no-report",
                 "--json", "four.json")  # fmt: skip
    tells, plain = bench.json("four.json")["hooks"]
    assert "the hosts are (0, 0, 1, 1)" in tells["error"], done.stderr
    assert (plain["status"], len(plain["steps"]), len(plain["timed_steps"])) == ("done", 4, 2)


def test_a_rank_that_dies_on_one_host_ends_those_of_the_other(bench):
    flags = ("--hosts", "2", "--batch", "1", "--steps", "4", "--warmup", "1", "--threads", "1", "--repeats", "2")
    done = bench("--hooks", "bench_dies,allreduce", *flags, "--no-report", "--json", "dies.json")
    dies, plain = bench.json("dies.json")["hooks"]
    assert "rank 1 was ended by SIGSEGV" in dies["error"], done.stderr
    assert plain["status"] == "done"
    assert bench.processes() == []


@pytest.mark.parametrize("how", ["SIGKILL", "SIGINT", "SIGTERM"])
def test_whatever_ends_the_bench_ends_its_ranks_and_its_hosts(bench, how):
    process = bench.start("--hosts", "2", "--bandwidth", "1mbit", "--hooks", "allreduce", *SHORT)
    while "timing" not in process.stderr.readline():
        assert process.poll() is None
    assert len(bench.namespaces()) == 3
    process.send_signal(getattr(signal, how))
    process.communicate(timeout=60)
    end = time.monotonic() + 20
    while bench.processes() and time.monotonic() < end:
        time.sleep(0.1)
    assert bench.processes() == []


def test_where_none_can_be_made_one_line_says_why_and_the_link_is_emulated(bench, tmp_path, monkeypatch):
    for tool in ("unshare", "nsenter", "ip"):
        (tmp_path / tool).symlink_to(shutil.which(tool))
    monkeypatch.setitem(bench.environment, "PATH", str(tmp_path))
    flags = ("--hosts", "2", "--bandwidth", "200mbit", "--repeats", "2", "--json", "none.json")
    done = bench("--hooks", "allreduce,bench_tells", *SHORT, *flags)
    document = bench.json("none.json")
    plain, tells = document["hooks"]
    why = "No hosts could be made on this machine, so the link is emulated: there is no tc here"
    assert done.stderr.count(why) == done.stdout.count(why) == 1
    assert document["emulated_link"] == "200mbit"
    assert "the hosts are (0, 1)" in tells["error"]
    assert plain["step_seconds"] > 0.95 * plain["sent_bytes_per_step"] / 25e6
