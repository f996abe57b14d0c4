"""What cannot work is refused with one line and exit code 2, before a process starts and without torch."""

import subprocess
import sys

import pytest
from click.testing import CliRunner

from commhub.bench import BenchError, Settings, _run
from commhub.bench._check import checked
from commhub.bench._hooks import in_canonical_form, in_steady_state
from commhub.cli._bench import bench as command
from commhub.testing import temporary_plugin


@pytest.fixture
def no_launch(monkeypatch):
    """Fail the test if a process would be started."""
    monkeypatch.setattr(_run, "launch", lambda *_: pytest.fail("a process would have been started"))
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--hooks", "fp61"], ["fp61", "fp16"]),
        (["--hooks", "fp16(nonsense=1)"], ["nonsense"]),
        (["--hooks", "fp16,,"], ["position"]),
        (["--hooks", "fp16(("], ["bracket"]),
        (["--hooks", ""], ["--hooks names no hook"]),
        (["--hooks", "torch:quantize"], ["torch:quantize", "torch:none, torch:allreduce, torch:fp16, torch:bf16"]),
        (["--hooks", "torch:powersgd(rank=0)"], ["torch:powersgd(rank=0)"]),
        (["--hooks", "torch:fp16(rank=2)"], ["torch:fp16(rank=2)"]),
        (["--hooks", "torch:fp16", "--bandwidth", "1gbit"], ["torch:fp16 communicates past an emulated link"]),
        (["--hooks", "torch:fp16", "--shard", "2"], ["torch:fp16 is a hook for DDP"]),
        (["--data", "/no/such/text"], ["--data: no such file or folder: /no/such/text"]),
        (["--data", "short.txt"], ["has 5 bytes", "--batch 8"]),
        (["--bandwidth", "fast"], ["--bandwidth 'fast' is not understood"]),
        (["--latency", "3"], ["--latency '3' is not understood"]),
        (["--nproc", "0"], ["--nproc is 0, but must be at least 1"]),
        (["--steps", "-1"], ["--steps is -1, but must be at least 0"]),
        (["--steps", "0", "--repeats", "0"], ["--steps 0 --repeats 0 leaves nothing to be measured"]),
        (["--repeats", "-1"], ["--repeats is -1, but must be at least 0"]),
        (["--hosts", "0"], ["--hosts is 0, but must be at least 1"]),
        (["--hosts", "2", "--nproc", "3"], ["--hosts 2: 3 ranks cannot be dealt out evenly to that many"]),
        (["--hosts", "65"], ["--hosts is 65, but must be at most 64"]),
        (["--steps", "5", "--warmup", "5"], ["--warmup 5 leaves none of --steps 5"]),
        (["--batch", "0"], ["--batch"]),
        (["--threads", "0"], ["--threads"]),
        (["--shard", "0"], ["--shard is 0, but must be at least 1"]),
        (["--shard", "2", "--nproc", "3"], ["--shard 2: 3 ranks make no whole groups of that many"]),
        (["--shard", "2", "--bucket-cap-mb", "1"], ["--bucket-cap-mb is DDP's"]),
        (["--bucket-cap-mb", "0"], ["--bucket-cap-mb is 0.0, but must be above zero"]),
        (["--model", "huge"], ["--model", "tiny, small, wide, medium, large"]),
        (["--optimizer", "adam"], ["--optimizer", "adamw, sgd"]),
        (["--learning-rate", "0"], ["--learning-rate is 0.0, but must be above zero"]),
        (["--device", "tpu"], ["--device", "auto, cpu, cuda"]),
        (["--report", "no/such/folder/report.html"], ["--report", "its folder does not exist"]),
        (["--timeline", "no/such/folder/t.json"], ["--timeline", "its folder does not exist"]),
        (["--timeline", "t.json", "--repeats", "0"], ["--timeline shows steps that are timed in turn"]),
        (["--json", "."], ["--json", "it is a folder"]),
    ],
)
def test_a_wrong_setting_is_one_line_and_exit_code_2(no_launch, tmp_path, monkeypatch, flags, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "short.txt").write_text("short")
    result = CliRunner().invoke(command, ["--hooks", "allreduce", *flags])
    assert result.exit_code == 2
    assert result.stdout == ""
    assert len(result.stderr.splitlines()) == 1
    assert all(word in result.stderr for word in ["commhub bench:", *words])
    assert [file.name for file in tmp_path.iterdir()] == ["short.txt"]


@pytest.mark.parametrize(
    "flags", [["--hooks", "fp61"], ["--data", "/no/such/text"], ["--bandwidth", "fast"], ["--help"]]
)
def test_refusing_and_helping_load_no_torch(flags):
    code = (
        "import sys, click\n"
        "from commhub.cli._bench import bench\n"
        "try: bench(['--hooks', 'allreduce', *sys.argv[1:]])\n"
        "except SystemExit as end: print(end.code, 'torch' in sys.modules, 'matplotlib' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, *flags], capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[-1] == f"{0 if '--help' in flags else 2} False False"


def test_a_report_that_was_asked_for_needs_matplotlib(no_launch, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    result = CliRunner().invoke(command, ["--hooks", "allreduce", "--report", "x.html"])
    assert (result.exit_code, result.stderr) == (
        2,
        "commhub bench: the report needs matplotlib: pip install commhub[bench]\n",
    )
    assert checked(Settings(hooks=["allreduce"]), world_size=2).report is None
    assert checked(Settings(hooks=["allreduce"], report=""), world_size=2).report == ""


def test_without_a_wish_the_report_lies_in_the_current_folder():
    assert checked(Settings(hooks=["allreduce"]), world_size=2).report == "commhub-bench.html"


def test_settings_survive_json_and_tell_their_command():
    settings = Settings(hooks=["allreduce", "fp16"], steps=9, bandwidth="1gbit", report="", data="a b")
    assert Settings.from_dict(settings.as_dict()) == settings
    assert settings.command == (
        "commhub bench --hooks allreduce,fp16 --steps 9 --data 'a b' --bandwidth 1gbit --no-report"
    )
    assert Settings().command == "commhub bench"
    assert Settings.from_dict(Settings().as_dict()) == Settings()


def test_settings_are_refused_where_they_are_made():
    with pytest.raises(BenchError, match="--seed is -1"):
        Settings(seed=-1)


def test_hook_strings_are_brought_into_one_form_and_may_hold_a_wire():
    assert in_canonical_form("FP16_COMPRESS") == "fp16"
    assert in_canonical_form("Allreduce( wire = bf16 )") == "allreduce(wire=bf16)"


def test_a_dense_phase_is_skipped_unless_it_was_asked_for(tmp_path):
    options = [{"name": "start_step", "type": int, "default": 1000}, {"name": "rank", "type": int, "default": 1}]
    inner = [{"name": "inner", "type": "hook", "default": "late"}]
    hooks = {"late": {"options": options}, "outer": {"options": inner}}
    with temporary_plugin(tmp_path, hooks=hooks):
        assert in_canonical_form("late(rank=2)") == "late(rank=2)"
        assert in_steady_state("late(rank=2)") == "late(rank=2, start_step=0)"
        assert in_steady_state("late(start_step=3)") == "late(start_step=3)"
        assert in_steady_state("outer") == "outer(inner=late(start_step=0))"
        assert in_steady_state("outer(inner=outer(inner=late))") == "outer(inner=outer(inner=late(start_step=0)))"
        assert in_steady_state("outer(inner=late(start_step=3))") == "outer(inner=late(start_step=3))"
        assert in_steady_state("outer(inner=fp16)") == "outer(inner=fp16)"
    assert in_steady_state("fp16(wire=bf16)") == "fp16(wire=bf16)"
