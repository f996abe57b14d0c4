"""The command line: what it prints, and what it exits with."""

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from click.shell_completion import ShellComplete
from click.testing import CliRunner

from commhub.cli import main
from commhub.registry import _probe, _registry


def run(*args):
    return CliRunner().invoke(main, args)


def test_version():
    assert run("--version").output == "commhub, version 0.1.0\n"


def test_help_lists_the_commands_without_importing_them(site):
    before = {name for name in sys.modules if name.startswith("commhub.bench")}
    output = run("--help").output
    assert all(f"  {name} " in output for name in ("doctor", "enum", "info", "list"))
    assert {name for name in sys.modules if name.startswith("commhub.bench")} == before


def test_an_unknown_command_is_wrong_usage():
    assert run("lst").exit_code == 2


# list


def test_list_prints_aligned_columns(site):
    site.add("some-dist", "some")
    site.add("longer-dist", "another", averagers=["often"])
    assert run("list").output.splitlines() == [
        "name     kind      package      version  status  summary",
        "another  hook      longer-dist  1.0      ok      A test plugin.",
        "often    averager  longer-dist  1.0      ok      A test plugin.",
        "some     hook      some-dist    1.0      ok      A test plugin.",
    ]


def test_list_shows_a_broken_plugin_with_its_reason(site):
    site.add("bad-dist", "bad", source="import no_such_module_at_all")
    site.add("some-dist", "some")
    done = run("list")
    assert done.exit_code == 0
    assert "broken" in done.output
    assert "no_such_module_at_all" in done.output
    assert len(done.output.splitlines()) == 3


def test_what_a_plugin_prints_stays_out_of_the_output(site):
    site.add("some-dist", "some", source="print('hello')\n" + _source("some"))
    assert json.loads(run("list", "--json").stdout)[0]["name"] == "some"
    _registry.refresh()
    assert "hello" not in run("info", "some").stdout


def test_list_as_json(site):
    site.add("some-dist", "some")
    site.add("bad-dist", "bad", source="syntax error")
    rows = json.loads(run("list", "--json").output)
    assert [(row["name"], row["status"]) for row in rows] == [("bad", "broken"), ("some", "ok")]
    assert {"name", "kind", "distribution", "version", "status", "summary", "error"} <= set(rows[0])
    assert rows[1]["error"] is None
    assert "SyntaxError" in rows[0]["error"]


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("quant", ["quantize_per_tensor"]),
        ("QUANTIZE-*", ["quantize_per_tensor"]),
        ("*16", ["fp16"]),
        ("fp16_compress", ["fp16"]),
        ("commhub-", ["fp16", "quantize_per_tensor"]),
        ("[fx]*", ["fp16"]),
        ("nothing", []),
    ],
)
def test_list_selects_by_part_or_glob(site, pattern, names):
    site.add("commhub-fp16", "fp16")
    site.add("commhub-quantize", "quantize_per_tensor")
    done = run("list", pattern, "--json")
    assert done.exit_code == 0
    assert [row["name"] for row in json.loads(done.output)] == names


def test_list_of_nothing_says_what_to_do(site):
    done = run("list")
    assert (done.exit_code, done.stdout) == (0, "")
    assert "pip install 'commhub[all]'" in done.stderr


def test_list_says_that_nothing_matches(site):
    site.add("some-dist", "some")
    done = run("list", "nosuch")
    assert (done.exit_code, done.stdout) == (0, "")
    assert done.stderr == "No installed name or package matches 'nosuch'.\n"


# info

FIELDS = """options=(
    Option(name='rank', type=int, default=1, help='How many.'),
    Option(name='mode', type=str, default='a', choices=('a', 'b')),
), preset={'rank': 2}, needs=('optimizer',), sent_bytes='2 n', reference='A paper.'"""


def test_info_describes_a_hook(site):
    site.add("some-dist", "some", fields=FIELDS)
    output = run("info", "SOME").output
    for text in [
        "some: hook of some-dist 1.0, ok",
        "rank  int  2 (preset)  How many.",
        "One of a, b.",
        "optimizer",
        "2 n",
        "A paper.",
        'commhub.register(model, "some(mode=a)", optimizer=optimizer)',
    ]:
        assert text in output


def test_info_as_json(site):
    site.add("commhub-powersgd", "powersgd", "powersgd_rank2", fields=FIELDS)
    (row,) = json.loads(run("info", "power-sgd", "--json").output)
    assert (row["name"], row["status"], row["aliases"]) == ("powersgd", "ok", ["power_sgd"])
    assert row["options"][0] == {
        "name": "rank",
        "type": "int",
        "default": 1,
        "choices": [],
        "help": "How many.",
    }
    assert (row["preset"], row["needs"], row["agrees"]) == ({"rank": 2}, ["optimizer"], True)


def test_info_shows_how_to_reach_a_shadowed_hook(site):
    site.add("some-dist", "fp16")
    assert '"some-dist:fp16"' in run("info", "some-dist:fp16").output


def test_info_describes_an_averager(site):
    site.add("some-dist", averagers=["often"])
    assert "often: averager of some-dist" in run("info", "often").output


def test_info_of_a_broken_plugin_gives_the_reason_and_says_no(site):
    site.add("bad-dist", "bad", source="import no_such_module_at_all")
    done = run("info", "bad")
    assert done.exit_code == 1
    assert "no_such_module_at_all" in done.output


def test_info_of_an_unknown_name_says_no(site):
    site.add("some-dist", "some")
    done = run("info", "smoe")
    assert done.exit_code == 1
    assert "Did you mean 'some'" in done.stderr


@pytest.mark.parametrize(
    "args",
    [
        ["info"],
        ["info", "a(b"],
        ["list", "a", "b"],
        ["enum"],
        ["enum", "--write", "x", "--check", "x"],
        ["list", "--nothing"],
    ],
)
def test_wrong_usage_exits_with_2(site, args):
    assert run(*args).exit_code == 2


def test_check_quick_and_sharded_exclude_each_other(site):
    site.add("some-dist", "some")
    done = run("check", "some", "--quick", "--sharded")
    assert done.exit_code == 2
    assert "--sharded runs no others" in done.stderr


# enum


def test_enum_writes_and_checks(site, tmp_path):
    site.add("some-dist", "some")
    path = tmp_path / "hooks.py"
    assert run("enum", "--check", str(path)).exit_code == 1
    assert run("enum", "--write", str(path)).exit_code == 0
    assert 'SOME = "some"' in path.read_text()
    assert run("enum", "--check", str(path)).exit_code == 0
    site.add("other-dist", "other")
    done = run("enum", "--check", str(path))
    assert done.exit_code == 1
    assert "is stale" in done.stderr


# doctor


def test_doctor_finds_every_plugin_in_order(site):
    site.add("some-dist", "some")
    done = run("doctor")
    assert done.exit_code == 0
    assert "broken: none" in done.output


BAD = {
    "bad-import": ("import no_such_module_at_all", "ModuleNotFoundError"),
    "bad-exit": ("import os; os._exit(7)", "exit code 7"),
    "bad-print": ("print('{}')\nraise RuntimeError('said so')", "said so"),
}


def test_doctor_says_no_and_shows_the_traceback(site):
    site.add("some-dist", "some")
    for distribution, (source, _) in BAD.items():
        site.add(distribution, distribution.replace("-", "_"), source=source)
    rows = {row["distribution"]: row for row in json.loads(run("doctor", "--json").output)}
    assert rows["some-dist"]["status"] == "ok"
    assert rows["some-dist"]["imports_torch"] is False
    assert rows["some-dist"]["import_ms"] >= 0
    for distribution, (_, reason) in BAD.items():
        assert rows[distribution]["status"] == "broken"
        assert reason in rows[distribution]["error"]
    assert 'raise RuntimeError("said so")' in rows["bad-print"]["traceback"].replace("'", '"')
    done = run("doctor")
    assert done.exit_code == 1
    assert "Traceback" in done.output


def test_doctor_gives_up_on_a_plugin_that_never_ends(site, monkeypatch):
    site.add("slow-dist", "slow", source="import time; time.sleep(60)")
    monkeypatch.setattr(_probe, "_LIMIT", 1)
    done = run("doctor")
    assert done.exit_code == 1
    assert "longer than 1 s" in done.output


def test_doctor_notices_torch(site):
    site.add("some-dist", "some", source="import sys; sys.modules['torch'] = sys\n" + _source("some"))
    (row,) = json.loads(run("doctor", "--json").output)
    assert (row["status"], row["imports_torch"]) == ("ok", True)


def test_doctor_does_not_load_what_is_disabled(site, monkeypatch):
    site.add("bad-dist", "bad", source="raise SystemExit")
    monkeypatch.setenv("COMMHUB_DISABLE", "bad")
    done = run("doctor", "--json")
    assert done.exit_code == 0
    assert json.loads(done.output)[0]["import_ms"] is None


def _source(name):
    return (
        "from commhub import HookSpec, hookimpl\n@hookimpl\ndef commhub_hooks():\n"
        f"    return [HookSpec(name={name!r}, summary='x', factory='a:b')]\n"
    )


# The shell


def test_names_are_completed_without_running_a_plugin(site):
    module = site.add("some-dist", "some_hook", "some_other", source="raise SystemExit")
    site.add("other-dist", "else")
    shell = ShellComplete(main, {}, "commhub", "_COMMHUB_COMPLETE")
    assert [item.value for item in shell.get_completions(["info"], "Some-")] == ["some_hook", "some_other"]
    assert [item.value for item in shell.get_completions([], "li")] == ["list"]
    assert "--version" in [item.value for item in shell.get_completions([], "--v")]
    assert module not in sys.modules


def test_a_closed_pipe_is_quiet():
    code = "import commhub.cli; commhub.cli.main(['list'], prog_name='commhub')"
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    child.stdout.close()
    errors = child.stderr.read().decode()
    assert child.wait() == 0
    assert "Error" not in errors
    assert "Exception" not in errors


def test_no_colour_goes_into_a_pipe(site):
    site.add("some-dist", "some")
    assert "\x1b" not in run("list").output + run("info", "some").output + run("doctor").output


def test_the_module_is_the_command():
    done = subprocess.run([sys.executable, "-m", "commhub", "--version"], capture_output=True, text=True)
    assert done.stdout == "commhub, version 0.1.0\n"


def test_report_the_cpu_time_of_list(capsys):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-m", "commhub", "list"], capture_output=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    with capsys.disabled():
        print(f"\ncommhub list: {spent * 1000:.0f} ms of CPU time")


def test_the_help_of_list_names_the_guides_to_frameworks():
    told = " ".join(CliRunner().invoke(main, ["list", "--help"]).stdout.split())
    assert "docs/frameworks.md" in told
    pages = Path(__file__).parents[2].glob("docs/frameworks-*.md")
    named = {"ray": "ray train", "logging": "logger"}
    topics = [path.stem.removeprefix("frameworks-") for path in pages]
    assert len(topics) > 10
    assert [topic for topic in topics if named.get(topic, topic) not in told.lower()] == []
