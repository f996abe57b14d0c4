"""The guides to launchers: torchrun on one machine and on two, and scripts and manifests that are linted.

Packages that are not installed leave their tests out, with that reason.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from .pages import (
    DOCS,
    LIMIT,
    ROOT,
    assert_same,
    blocks,
    hook_states,
    needs,
    on_two_ranks,
    run,
    script,
    torchrun,
    without_loss,
)

TORCHRUN = "frameworks-torchrun.md"
FAULT = """
    if registration.step == 25 and dist.get_rank() == 1 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), 9)
"""


def _torchrun_end(folder):
    """What the script of the page about torchrun has left: parameters, optimizer, and the hook's state by rank."""
    assert (folder / "checkpoints/latest").read_text() == "60"
    last = folder / "checkpoints/60"
    return {**torch.load(last / "model.pt", weights_only=True), "hook": hook_states(last / "hook")}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The folder in which the page's script was run on one machine, and what it has printed."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    done = on_two_ranks(script(TORCHRUN, folder))
    assert done.returncode == 0, done.stderr[-4000:]
    return folder, done.stdout


@pytest.mark.skipif("COMMHUB_EVERY_CHECK" not in os.environ, reason="COMMHUB_EVERY_CHECK")
def test_torchrun_restarts_after_a_kill_and_ends_as_without_one_bit_by_bit(tmp_path, uninterrupted):
    whole, printed = uninterrupted
    path = script(TORCHRUN, tmp_path)
    text = path.read_text()
    assert text.count("    optimizer.step()\n") == 1
    path.write_text(text.replace("    optimizer.step()\n", f"    optimizer.step(){FAULT}"))
    options = ("--nproc-per-node", 2, "--standalone", "--local-addr", "127.0.0.1", "--max-restarts", 1)
    (lines,) = [block for block in blocks(TORCHRUN, "bash") if "--max-restarts" in block]
    exported = dict(re.findall(r"^export (\w+)=(\S+)$", lines, re.M))
    done = torchrun(*options, path, folder=tmp_path, **exported)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "exitcode: -9" in done.stderr
    assert done.stdout == printed  # the steps 21 to 25 were done twice, and nothing is printed in them
    assert_same(_torchrun_end(whole), _torchrun_end(tmp_path))


def test_the_script_for_torchrun_prints_what_its_page_shows(uninterrupted):
    _, printed = uninterrupted
    (shown,) = blocks(TORCHRUN, "text")
    lines = [without_loss(line) for line in printed.splitlines()]
    assert len(lines) == 6
    assert [line for line in shown.splitlines() if line != "..." and without_loss(line) not in lines] == []


@pytest.mark.skipif("COMMHUB_EVERY_CHECK" not in os.environ, reason="COMMHUB_EVERY_CHECK")
def test_torchrun_on_two_machines_ends_as_on_one_bit_by_bit(tmp_path, uninterrupted, machines):
    (line,) = [block for block in blocks(TORCHRUN, "bash") if "--node-rank 0" in block]
    arguments = line.replace("torchrun", "").replace("--nproc-per-node 2", "--nproc-per-node 1").split()
    script(TORCHRUN, tmp_path)
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("TORCHELASTIC", "PYTEST"))}
    environment |= {"GLOO_SOCKET_IFNAME": "eth0", "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    running = []
    try:
        for rank, name in enumerate(machines.names):
            mine = [{"0": str(rank)}.get(a, a) if before == "--node-rank" else a for before, a in _pairs(arguments)]
            command = (sys.executable, "-m", "torch.distributed.run", *mine)
            running.append(
                machines.start(rank, *command, cwd=tmp_path, env=environment | {"COMMHUB_HOST": name}, **pipes)
            )
        said = [process.communicate(timeout=LIMIT)[0] for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0, 0], "\n".join(text[-3000:] for text in said)
    assert uninterrupted[1] in said[0]
    assert_same(_torchrun_end(uninterrupted[0]), _torchrun_end(tmp_path))


def _pairs(arguments):
    return zip(["", *arguments], arguments, strict=False)


def test_the_slurm_script_is_linted(tmp_path):
    (text,) = [block for block in blocks("frameworks-slurm.md", "bash") if "SBATCH" in block]
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

    (text,) = blocks("frameworks-kubernetes.md", "yaml")
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
    (mount,) = container["volumeMounts"]
    assert {"name": "CHECKPOINTS", "value": mount["mountPath"]} in container["env"]
    wrong = {**job, "spec": {**job["spec"], "completionsMode": "Indexed"}}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, "1.31", strict=True)


def test_the_index_links_every_guide():
    text = (DOCS / "frameworks.md").read_text(encoding="utf-8")
    pages = {path.name for path in DOCS.glob("frameworks-*.md")}
    assert {page for page in pages if f"({page})" not in text} == set()
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert {page for page in (*pages, "frameworks.md") if f"(docs/{page})" not in readme} == set()
