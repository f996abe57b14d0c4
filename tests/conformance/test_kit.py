"""The kit's own manners: expected failures, what does not apply, counting, the command line."""

import contextlib
import json
import subprocess
import sys

import pytest
from click.testing import CliRunner

from commhub.cli._check import _COLUMNS, check
from commhub.registry._formula import evaluate
from commhub.testing import CheckResult, check_hook
from commhub.testing.conformance._list import all_checks
from commhub.testing.conformance._run import summary

QUICK = ("static", "simulated")


def run(*arguments):
    command = [sys.executable, "-m", "commhub", "check", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_an_expected_failure_is_shown_as_such_and_a_pass_that_was_not_expected_fails(ranks):
    expected = {"mean": "only for this test"}
    results = {
        r.check: r for r in check_hook("allreduce", expected_failed_checks=expected, where=QUICK, pool=ranks.pool)
    }
    assert results["mean"].status == "failed"
    assert "expected to fail" in results["mean"].reason
    results = {r.check: r for r in check_hook("noop", where=("simulated",), pool=ranks.pool)}
    assert results["ranks_agree"].status == "not applicable"


def test_an_unknown_expected_failure_is_an_error():
    with pytest.raises(ValueError, match=r"nonsense.*the checks are"):
        check_hook("allreduce", expected_failed_checks={"nonsense": "none"})


def test_fewer_checks_than_the_minimum_are_an_error(ranks):
    with pytest.raises(ValueError, match="at least 500"):
        check_hook("allreduce", where=("static",), minimum=500, pool=ranks.pool)


def test_a_summary_counts_the_results():
    made = [CheckResult(check="a", nproc=0, status=s, reason="", seconds=0.0) for s in ("passed", "failed", "passed")]
    assert summary(made) == "2 passed, 1 failed"
    assert summary([]) == "nothing was checked"


def test_the_command_prints_json_or_a_table_and_says_no_by_its_exit_code(ranks, monkeypatch):
    good = run("allreduce", "--quick", "--json")
    assert good.returncode == 0, good.stderr
    rows = json.loads(good.stdout)
    assert {"check", "nproc", "status", "reason", "seconds"} <= rows[0].keys()
    assert {row["status"] for row in rows} <= {"passed", "not applicable"}
    # The rest in this process, on ranks that are there: a pool of its own loads torch twice.
    monkeypatch.setattr("commhub.testing._pool.RankPool", lambda: contextlib.nullcontext(ranks.pool))
    bad = CliRunner().invoke(check, ["allreduce", "--quick", "--expect-failure", "loads=only for this test"])
    assert bad.exit_code == 1
    assert "1 failed" in bad.stdout.splitlines()[-1]
    for wrong in (("--nproc", "two"), ("--expect-failure", "loads")):
        assert CliRunner().invoke(check, ["allreduce", *wrong]).exit_code == 2
    unknown = run("no_such_hook")
    assert (unknown.returncode, len(unknown.stderr.strip().splitlines())) == (1, 1)


def test_each_row_is_printed_as_its_check_ends_and_the_columns_stand(monkeypatch, capsys):
    printed = []

    def checks_two(name, *, report, **_):
        results = [
            CheckResult(check="loads", nproc=0, status="passed", reason="", seconds=0.04),
            CheckResult(check="trains", nproc=64, status="expected failure", reason="too slow\nby far", seconds=9.96),
        ]
        for result in results:
            report(result)
            printed.append(capsys.readouterr().out)
        return results

    monkeypatch.setattr("commhub.testing.check_hook", checks_two)
    check.main(["fp16"], standalone_mode=False)
    header, first = printed[0].splitlines()
    assert first.split() == ["loads", "passed", "0.0", "s"]
    assert printed[1].splitlines() == [printed[1].rstrip()], "one row"
    for title, cell in {"on": "64 ranks", "result": "expected failure", "took": "10.0 s", "why": "too slow\n"}.items():
        assert printed[1].index(cell) == header.index(title)
    assert max(len(one.name) for one in all_checks()) <= _COLUMNS["check"]


def test_each_result_is_reported_before_the_next_check_begins(ranks):
    told = []

    def stop(result):
        told.append(result.check)
        if result.check == "spec_without_torch":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        check_hook("allreduce", where=("static",), pool=ranks.pool, report=stop)
    assert told == ["loads", "name_is_its_own", "spec_without_torch"]


def test_formulas_are_arithmetic_and_nothing_else():
    values = {"p": 4, "numel": 100, "bits": 4, "flag": False}
    assert evaluate("2 * (p-1)/p * numel * bits/8", values) == 75.0
    assert evaluate("min(p, 3) + ceil(sqrt(numel)) - (1 if flag else 2)", values) == 11.0
    for bad in ("__import__('os')", "p.real", "numel x 2", "q + 1", "[1]", "p if", "max(numel, key=p)", "1/0", ""):
        with pytest.raises(ValueError, match=r"formula|arithmetic|no value"):
            evaluate(bad, values)
