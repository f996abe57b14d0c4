"""What is sent between replicas, counted where it leaves the machine: two of them, with a shard group on each.

The machines are network namespaces, so that the kernel counts what crosses. The counts of all ranks of a machine are
one: what is checked is their sum.
"""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from .crossing import PLAIN
from .sharding import EVERY

STEPS, LIMIT, UNITS = 15, 300, 2
COLLECTIVES = {"allreduce": 1, "fp16": 1, "quantize_per_channel": 2, "powersgd(rank=2, start_step=0)": 2}
"""Of each bucket."""
POWERSGD = list(COLLECTIVES)[-1]
NOISE = 300 / STEPS
"""In a step: 300 bytes of all that so many steps send are left to ARP and to options of TCP."""


PATIENT = """
echo 0 >/proc/sys/net/ipv4/tcp_early_retrans
ip route change 10.77.0.0/24 dev eth0 proto kernel scope link src {address} rto_min 60s
ip route change local {address} dev eth0 table local proto kernel scope host src {address} rto_min 60s
"""
"""The link loses nothing: TCP need not send anything twice because a busy host answers late."""


def measured(machines, folder):
    """By machine and rank, what ``crossing`` has found; ``noop`` is what the core sends without any hook's messages."""
    script = Path(__file__).with_name("crossing.py")
    for machine, address in enumerate(machines.addresses):
        set_up = machines.start(
            machine, "sh", "-ec", PATIENT.format(address=address), stderr=subprocess.PIPE, text=True
        )
        assert set_up.communicate() == (None, "")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("TORCHELASTIC", "PYTEST"))}
    environment |= {"GLOO_SOCKET_IFNAME": "eth0", "OMP_NUM_THREADS": "1", "WORLD_SIZE": "4"}
    environment |= {"MASTER_ADDR": machines.addresses[0], "MASTER_PORT": "29500"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    running = []
    try:
        for rank in range(4):
            own = {"RANK": str(rank), "COMMHUB_HOST": machines.names[rank // 2]}
            command = (sys.executable, script, folder, STEPS, "noop", *COLLECTIVES)
            running.append(machines.start(rank // 2, *command, env=environment | own, **pipes))
        said = [process.communicate(timeout=LIMIT) for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0] * 4, "\n".join(error[-3000:] for _, error in said)
    ranks = [json.loads(text) for text, _ in said]
    return [ranks[:2], ranks[2:]]


def crossed(machine, what):
    """What has left the machine in a step. Both ranks have counted all of it."""
    counts = [rank["found"][what]["eth0"] for rank in machine]
    assert abs(counts[0] - counts[1]) <= NOISE
    return sum(counts) / len(counts)


def accounted(machine, what):
    return sum(rank["found"][what]["accounted"] for rank in machine)


def check_fsdp(machine):
    """Each rank gathers parameters and scatters gradients: of each its half goes to the other, and stays inside."""
    whole = 4 * 2 * sum(math.prod(shape) for shape in machine[0]["shapes"])
    assert abs(crossed(machine, "none")) <= NOISE
    for what in ("none", *COLLECTIVES):
        assert machine[0]["found"][what]["lo"] >= 2 * whole


def check_hook(machine, hook):
    """Beyond what is accounted is what the core tells, and Gloo's own headers: both are measured by themselves."""
    core, gloo = crossed(machine, "noop"), crossed(machine, "gloo") - 2 * 4 * PLAIN
    assert 0 < core < 500
    assert 0 < gloo < 2000
    beyond = crossed(machine, hook) - accounted(machine, hook)
    headers = gloo * UNITS * COLLECTIVES[hook]
    assert core - NOISE <= beyond <= core + headers + NOISE, hook
    if hook != "quantize_per_channel":  # whose collectives are others, with fewer messages
        assert abs(beyond - core - headers) <= NOISE, hook


def check_powersgd(machine):
    """It sends what the shapes of the shards say: two columns of each side of a matrix, and vectors."""
    elements = 0
    for rank in machine:
        for rows, *columns in rank["shapes"]:
            elements += 2 * (rows + columns[0]) if columns else rows
    assert accounted(machine, POWERSGD) == 4 * elements
    assert accounted(machine, "allreduce") > 14 * accounted(machine, POWERSGD)


@pytest.mark.skipif(not EVERY, reason="COMMHUB_EVERY_CHECK")
def test_what_is_accounted_leaves_a_machine_and_nothing_of_the_shard_group_does(machines, tmp_path):
    for machine in measured(machines, tmp_path):
        check_fsdp(machine)
        for hook in COLLECTIVES:
            check_hook(machine, hook)
        check_powersgd(machine)
