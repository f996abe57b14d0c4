"""Benches in processes of their own, and results made by hand."""

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from commhub.bench._hosts import Hosts, NoHostsError
from commhub.bench._options import Settings
from commhub.bench._results import HookResult, Outcome, StepRecord
from commhub.testing import temporary_plugin

COMMAND = [sys.executable, "-m", "commhub", "bench"]

BAD_HOOKS = """
    import os, signal
    import attrs
    from commhub import AllReduce

    @attrs.define
    class Raises:
        "Raises on rank 1 in its third step."
        def reduce(self, bucket):
            if bucket.step == 2 and bucket.rank == 1:
                raise RuntimeError("no more\\nof this")
            bucket.flat.copy_((yield AllReduce(bucket.flat)))

    @attrs.define
    class Dies:
        "Dies in native code on rank 1 in its third step."
        def reduce(self, bucket):
            if bucket.step == 2 and bucket.rank == 1:
                os.kill(os.getpid(), signal.SIGSEGV)
            bucket.flat.copy_((yield AllReduce(bucket.flat)))

    @attrs.define
    class Tells:
        "Says where the ranks are, in its error."
        def prepare(self, setup):
            raise RuntimeError(f"the hosts are {setup.hosts}")
        def reduce(self, bucket):
            yield AllReduce(bucket.flat)
"""


@pytest.fixture(scope="session")
def text_file(tmp_path_factory):
    """A small text, so that no rank reads the whole standard library."""
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("".join(f"line {number}: the quick brown fox\n" for number in range(8_000)))
    return file


@pytest.fixture(scope="session")
def bad_hooks(tmp_path_factory):
    """A folder for PYTHONPATH with a plugin whose hooks fail in training."""
    folder = tmp_path_factory.mktemp("plugin")
    hooks = {"bench_raises": "Raises", "bench_dies": "Dies", "bench_tells": "Tells"}
    temporary_plugin(folder, "commhub-bench-bad", hooks=hooks, source=BAD_HOOKS)
    return folder


class Bench:
    """`commhub bench` (or torchrun) in a folder of its own, temporary files included."""

    def __init__(self, folder: Path, text: Path, plugins: Path) -> None:
        self.folder = folder
        self.temporary = folder / "tmp"
        self.temporary.mkdir()
        self._data = ["--data", str(text)]
        path = os.pathsep.join(filter(None, [str(plugins), os.environ.get("PYTHONPATH")]))
        dropped = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
        environment = {key: value for key, value in os.environ.items() if key not in dropped}
        self.environment = environment | {"PYTHONPATH": path, "TMPDIR": str(self.temporary)}

    def start(self, *flags, launcher=()):
        command = [*launcher, *COMMAND[1:]] if launcher else COMMAND
        process = subprocess.Popen(
            [*command, *self._data, *flags],
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        # A bench that hangs ends, and its test with it: reading its output has no time limit of its own.
        watchdog = threading.Timer(180, process.kill)
        watchdog.daemon = True
        watchdog.start()
        return process

    def __call__(self, *flags, launcher=()):
        process = self.start(*flags, launcher=launcher)
        out, err = process.communicate()
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def json(self, name="out.json"):
        return json.loads((self.folder / name).read_text())

    def processes(self):
        """The ranks and launchers of this bench that are alive: they carry its folder for temporary files."""
        found = []
        for environ in Path("/proc").glob("[0-9]*/environ"):
            try:
                ours = f"TMPDIR={self.temporary}\0".encode() in environ.read_bytes()
                alive = ours and environ.with_name("stat").read_text().rpartition(")")[2].split()[0] != "Z"
            except OSError:
                continue
            if alive:
                found.append(environ.parent.name)
        return found

    def namespaces(self):
        """The network namespaces that these are in, but for this process's own."""
        found = {os.readlink(f"/proc/{pid}/ns/net") for pid in self.processes()}
        return found - {os.readlink("/proc/self/ns/net")}


@pytest.fixture(scope="module")
def bench(tmp_path_factory, text_file, bad_hooks):
    """A bench for this module; what a failed test left behind is ended."""
    made = Bench(tmp_path_factory.mktemp("bench"), text_file, bad_hooks)
    yield made
    for pid in made.processes():
        os.kill(int(pid), signal.SIGKILL)


@pytest.fixture(scope="session")
def hosts_can_be_made():
    """Skip where they cannot."""
    try:
        with Hosts(1):
            pass
    except NoHostsError as error:
        pytest.skip(f"no hosts can be made here: {error}")


@pytest.fixture
def make_result():
    """A hook's result from step times, everything else plausible."""

    def make(hook="allreduce", times=(0.2,) * 8, *, compression=1.0, status="done", loss=3.0, **changes):
        records = tuple(
            StepRecord(
                step=step,
                loss=5.0 - step / len(times),
                seconds=seconds,
                encode=0.01,
                wait=seconds / 2,
                decode=0.005,
                sent_bytes=1e6 / compression if compression else 0.0,
                reference_bytes=1e6,
            )
            for step, seconds in enumerate(times)
        )
        values = {"hook": hook, "ran_as": hook, "status": status, "warmup": 2, "records": records}
        return HookResult(**(values | {"validation_loss": loss} | changes))

    return make


@pytest.fixture
def make_outcome():
    """An outcome of these results."""

    def make(*results, link="", floor=(), bandwidth=None, hosts=0, **settings):
        chosen = Settings(hooks=[result.hook for result in results], steps=8, warmup=2, **settings)
        setup = {
            "torch": "2.13.0",
            "device": "CPU",
            "backend": "gloo",
            "world_size": 2,
            "machines": 1,
            "threads": 1,
            "parameters": 873_216,
            "text_bytes": 12_000_000,
        }
        return Outcome(
            settings=chosen.as_dict(),
            command=chosen.command,
            machine={"system": "Linux x86_64", "cores": 2, "python": "3.11.7", "commhub": "0.1.0"},
            setup=setup,
            link=link,
            results=results,
            floor=floor,
            bandwidth=bandwidth,
            hosts=hosts,
        )

    return make
