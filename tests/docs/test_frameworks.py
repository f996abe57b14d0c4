"""The guides to launchers and frameworks: their scripts run with the real packages, and their manifests are linted.

Packages that are not installed leave their tests out, with that reason.
"""

import os
import re
import shutil
import subprocess
import sys
import uuid
from importlib import util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
LIMIT = 400
"""Seconds after which a script is ended; it takes a tenth of that."""


def needs(package):
    return pytest.mark.skipif(util.find_spec(package) is None, reason=f"{package} is not installed here")


def blocks(page, language):
    text = (DOCS / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.S | re.M)


def script(page, folder, before="", after=""):
    """A page's Python blocks as one script; it leaves a file behind where it has come to its end."""
    lines = [before, *blocks(page, "python"), after, "import os, pathlib"]
    lines.append("pathlib.Path('ended-' + os.environ.get('RANK', 'driver')).touch()")
    path = folder / "train.py"
    path.write_text("\n".join(lines))
    return path


def run(*command, folder, **environment):
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("TORCHELASTIC", "SLURM", "PYTEST"))}
    kept |= {"OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(command, cwd=folder, env=kept, capture_output=True, text=True, timeout=LIMIT)


def torchrun(*arguments, folder, **environment):
    return run(sys.executable, "-m", "torch.distributed.run", *map(str, arguments), folder=folder, **environment)


def on_two_ranks(path):
    return torchrun("--nproc-per-node", 2, "--standalone", "--local-addr", "127.0.0.1", path, folder=path.parent)


@needs("ignite")
def test_the_ignite_page_resumes_bit_by_bit(tmp_path):
    done = on_two_ranks(script("frameworks-ignite.md", tmp_path))
    assert sorted(path.name for path in tmp_path.glob("ended-*")) == ["ended-0", "ended-1"], done.stderr[-4000:]
    assert (tmp_path / "checkpoints" / "hook-10").is_dir()


DDP = """
import torch
import torch.distributed as dist
dist.init_process_group("gloo")
model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(8, 8))
"""


@needs("tensorboard")
def test_tensorboard_has_the_figures_of_each_step(tmp_path):
    done = on_two_ranks(script("frameworks-logging.md", tmp_path, DDP, "dist.destroy_process_group()"))
    assert sorted(path.name for path in tmp_path.glob("ended-*")) == ["ended-0", "ended-1"], done.stderr[-4000:]
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "runs"))
    events.Reload()
    sent = [event.value for event in events.Scalars("commhub/sent_bytes")]
    assert sent == [2 * 1 / 2 * (8 * 8 + 8) * 2] * 4  # two bytes an element, on two ranks
    assert [event.value for event in events.Scalars("commhub/compression")] == [2.0] * 4


@needs("ray")
def test_the_ray_page_resumes_bit_by_bit(tmp_path):
    path = script("frameworks-ray.md", tmp_path, "import ray\nray.init(num_cpus=4, include_dashboard=False)\n")
    done = run(sys.executable, str(path), folder=tmp_path, HOME=str(tmp_path))  # where Ray keeps its results
    assert (tmp_path / "ended-driver").exists(), (done.stdout + done.stderr)[-6000:]
    assert "compression 3.25" in done.stdout, done.stdout[-2000:]


class Machines:
    """Network namespaces that are machines to what runs in them: addresses, routes and a link of their own."""

    def __init__(self, count):
        self.names = [f"ch{uuid.uuid4().hex[:8]}" for _ in range(count)]
        self.addresses = [f"10.77.0.{1 + place}" for place in range(count)]

    def __enter__(self):
        first, second = self.names
        try:
            for name in self.names:
                _ip("netns", "add", name)
            _ip("link", "add", "eth0", "netns", first, "type", "veth", "peer", "name", "eth0", "netns", second)
            for name, address in zip(self.names, self.addresses, strict=True):
                _ip("-n", name, "addr", "add", f"{address}/24", "dev", "eth0")
                for device in ("lo", "eth0"):
                    _ip("-n", name, "link", "set", device, "up")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        for name in self.names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)


def _ip(*arguments):
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


def why_no_machines():
    if shutil.which("ip") is None:
        return "iproute2 is not installed here"
    try:
        with Machines(2):
            return ""
    except (OSError, subprocess.CalledProcessError) as error:
        return f"no network namespaces can be made here: {error}"


@pytest.mark.skipif("COMMHUB_EVERY_CHECK" not in os.environ, reason="COMMHUB_EVERY_CHECK")
def test_torchrun_on_two_machines_as_the_page_says(tmp_path):
    if why := why_no_machines():
        pytest.skip(why)
    (line,) = [block for block in blocks("machines.md", "bash") if "--node-rank 0" in block]
    arguments = line.replace("torchrun", "").replace("--nproc-per-node 2", "--nproc-per-node 1").split()
    shutil.copy(DOCS / "examples" / "train.py", tmp_path)
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("TORCHELASTIC", "PYTEST"))}
    environment |= {"GLOO_SOCKET_IFNAME": "eth0", "OMP_NUM_THREADS": "1"}
    with Machines(2) as machines:
        running = []
        for rank, name in enumerate(machines.names):
            mine = [{"0": str(rank)}.get(a, a) if before == "--node-rank" else a for before, a in _pairs(arguments)]
            command = ["ip", "netns", "exec", name, sys.executable, "-m", "torch.distributed.run", *mine]
            running.append(
                subprocess.Popen(
                    command,
                    cwd=tmp_path,
                    env=environment | {"COMMHUB_HOST": name},
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                )
            )
        try:
            said = [process.communicate(timeout=LIMIT)[0] for process in running]
        finally:
            for process in running:
                process.kill()
    assert [process.returncode for process in running] == [0, 0], "\n".join(text[-3000:] for text in said)
    assert "step 50" in said[0]


def _pairs(arguments):
    return zip(["", *arguments], arguments, strict=False)


def test_the_slurm_script_is_linted(tmp_path):
    (text,) = [block for block in blocks("machines.md", "bash") if "SBATCH" in block]
    path = tmp_path / "job.sh"
    path.write_text(text)
    assert run("bash", "-n", str(path), folder=tmp_path).stderr == ""
    linter = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if linter is None:
        pytest.skip("shellcheck is not installed here; bash has read the script")
    done = run(linter, str(path), folder=tmp_path)
    assert done.returncode == 0, done.stdout


@needs("kubernetes_validate")
def test_the_kubernetes_manifests_are_valid_for_the_api(tmp_path):
    import kubernetes_validate
    import yaml

    (text,) = blocks("machines.md", "yaml")
    documents = list(yaml.safe_load_all(text))
    assert [one["kind"] for one in documents] == ["Service", "Job"]
    for one in documents:
        kubernetes_validate.validate(one, "1.31", strict=True)
    service, job = documents
    pod = job["spec"]["template"]["spec"]
    assert pod["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["selector"]["job-name"] == job["metadata"]["name"]
    (container,) = pod["containers"]
    assert {one["name"] for one in container["volumeMounts"]} == {one["name"] for one in pod["volumes"]}
    wrong = {**job, "spec": {**job["spec"], "completionsMode": "Indexed"}}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, "1.31", strict=True)


def test_the_index_links_every_guide():
    text = (DOCS / "frameworks.md").read_text(encoding="utf-8")
    pages = {path.name for path in DOCS.glob("frameworks-*.md")}
    assert {page for page in pages if f"({page})" not in text} == set()
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "(docs/frameworks.md)" in readme
