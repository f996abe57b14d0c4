"""A rank on one of two machines: trains under each hook, and counts what the machine's interfaces send meanwhile.

    python crossing.py FOLDER STEPS HOOK...

Prints JSON: the shapes of its shards, and by hook what a step has accounted and what the interfaces have counted.
Besides hooks there are two that tell what is no hook's: ``none``, FSDP by itself, and ``gloo``, which all-reduces
PLAIN numbers between replicas once a step and trains nothing. The ranks meet in FOLDER, which is empty.
"""

import json
import os
import sys
import time
from datetime import timedelta
from pathlib import Path

import attrs
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import commhub

HEADERS = 14 + 20 + 20 + 12
"""Ethernet, IPv4, TCP and its timestamps: of each packet that the interface counts, segmented further or not."""
PLAIN, LIMIT, TRIES = 1000, 60, 5


def sharded(mesh):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 256), nn.Tanh(), nn.Linear(256, 64))
    for layer in (model[0], model[2]):
        fully_shard(layer, mesh=mesh["shard"])
    return fully_shard(model, mesh=mesh["shard"])


def trains(model):
    def step():
        model.zero_grad()
        model(torch.randn(8, 64)).square().mean().backward()

    return step


def sent(device):
    """Bytes that an interface of this machine has sent since it was made, without headers."""
    folder = Path("/sys/class/net", device, "statistics")
    size, packets = (int((folder / name).read_text()) for name in ("tx_bytes", "tx_packets"))
    return size - HEADERS * packets


def sent_again():
    """Segments that this machine's TCP has sent a second time."""
    lines = [line.split() for line in Path("/proc/net/snmp").read_text().splitlines() if line.startswith("Tcp:")]
    return int(dict(zip(*lines, strict=True))["RetransSegs"])


@attrs.define
class Meeting:
    """Where all ranks wait for one another: in a folder, so that nothing is sent for it."""

    folder: Path
    count: int = 0

    def wait(self, said=0):
        """What all ranks have said, in their order."""
        self.count += 1
        mine = self.folder / f"{self.count}-{dist.get_rank()}"
        mine.with_suffix(".new").write_text(str(said))
        mine.with_suffix(".new").rename(mine)
        every = [self.folder / f"{self.count}-{rank}" for rank in range(dist.get_world_size())]
        end = time.monotonic() + LIMIT
        while not all(one.exists() for one in every):
            assert time.monotonic() < end, "the others do not come"
            time.sleep(0.005)
        return [int(one.read_text()) for one in every]


def window(step, count, accounted, meeting):
    """What was accounted and what was counted in so many steps; done again where TCP has sent anything twice."""

    def look():
        meeting.wait()  # nobody is in a step any more
        time.sleep(0.05)  # Gloo's threads have sent all that they have
        seen = {"accounted": accounted(), "eth0": sent("eth0"), "lo": sent("lo")}
        return seen, meeting.wait(sent_again())  # nobody is in the next one before all have looked

    for _ in range(TRIES):
        before, former = look()
        for _ in range(count):
            step()
        after, later = look()
        if former == later:
            return {name: after[name] - before[name] for name in before}
    raise RuntimeError(f"in each of {TRIES} windows TCP has sent something twice: this host is too busy")


def measure(step, count, meeting, accounted=lambda: 0.0):
    """By step: twice as many steps less so many."""
    for _ in range(2):
        step()  # connections are made, and what steps need is prepared
    once, twice = (window(step, times * count, accounted, meeting) for times in (1, 2))
    return {name: (twice[name] - once[name]) / count for name in once}


def main(folder, count, hooks):
    """Measure one after the other."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=LIMIT))
    meeting = Meeting(folder)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    group = mesh["replicate"].get_group()
    model = sharded(mesh)
    found = {
        "none": measure(trains(model), count, meeting),
        "gloo": measure(lambda: dist.all_reduce(torch.ones(PLAIN), group=group), count, meeting),
    }
    for hook in hooks:
        registration = commhub.register(model, hook, process_group=group)
        found[hook] = measure(trains(model), count, meeting, lambda one=registration: one.stats.sent_bytes)
        registration.remove()
    shapes = [tuple(parameter.to_local().shape) for parameter in model.parameters()]
    print(json.dumps({"shapes": shapes, "found": found}))
    meeting.wait()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
    sys.stdout.flush()
    os._exit(0)  # Gloo's threads need not be waited for
