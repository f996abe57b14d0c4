"""What commhub costs, and what it gains, against PyTorch alone: medians and ratios from one interleaved run.

    torchrun --nproc-per-node 2 docs/examples/overhead.py

Trains one model under each way in turn, step by step, so that a machine that drifts drifts for all of them.
PyTorch's PowerSGD hook is measured with a single bucket, where it works on Gloo.
"""

from __future__ import annotations

import argparse
import statistics
import time
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

import commhub

if TYPE_CHECKING:
    from collections.abc import Mapping

ONE_BUCKET = 10_000


def build(width: int, layers: int, bucket_cap_mb: float) -> DistributedDataParallel:
    """A stack of square layers, the same on every rank."""
    torch.manual_seed(0)
    stack = [torch.nn.Linear(width, width) for _ in range(layers)]
    return DistributedDataParallel(torch.nn.Sequential(*stack), bucket_cap_mb=bucket_cap_mb)


def with_torch(model: DistributedDataParallel, rank: int) -> None:
    """PyTorch's own PowerSGD."""
    state = PowerSGDState(process_group=None, matrix_approximation_rank=rank, start_powerSGD_iter=3)
    model.register_comm_hook(state, powerSGD_hook)


def with_commhub(model: DistributedDataParallel, hook: str) -> None:
    """A hook by name."""
    commhub.register(model, hook)


def compare(ways: Mapping[str, tuple[float, partial[None] | None]], width: int, layers: int, steps: int) -> None:
    """Print the median step time of each way, in ms, and its ratio to the first."""
    models = {}
    for name, (cap, prepare) in ways.items():
        models[name] = build(width, layers, cap)
        if prepare is not None:
            prepare(models[name])
    times: dict[str, list[float]] = {name: [] for name in ways}
    x = torch.randn(32, width)
    for _ in range(steps):
        for name, model in models.items():
            model.zero_grad()
            dist.barrier()
            began = time.perf_counter()
            model(x).pow(2).mean().backward()
            times[name].append(time.perf_counter() - began)
    if dist.get_rank() == 0:
        first = next(iter(ways))
        base = times[first][6:]
        for name, every in times.items():
            ratio = statistics.median(a / b for a, b in zip(every[6:], base, strict=True))
            print(f"  {name:36} {1e3 * statistics.median(every[6:]):8.2f} ms   {ratio:5.2f} x {first}", flush=True)


def main() -> None:
    """Compare, and print."""
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--width", type=int, default=512)
    arguments.add_argument("--layers", type=int, default=24)
    arguments.add_argument("--steps", type=int, default=60)
    given = arguments.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    say = print if dist.get_rank() == 0 else (lambda *_: None)
    mib = given.layers * (given.width**2 + given.width) * 4 / 2**20
    say(f"{dist.get_world_size()} ranks, {mib:.0f} MiB of gradients, {given.steps} steps each, interleaved")
    for cap, label in ((25, "25 MiB buckets"), (2, "2 MiB buckets")):
        say(f"overhead of register, {label}")
        ways: dict[str, tuple[float, partial[None] | None]] = {
            "DDP without a hook": (cap, None),
            "allreduce": (cap, partial(with_commhub, hook="allreduce")),
        }
        compare(ways, given.width, given.layers, given.steps)
    say("PowerSGD, one bucket")
    ways = {}
    for rank in (1, 2, 4):
        ours = partial(with_commhub, hook=f"powersgd(rank={rank}, start_step=3)")
        ways[f"PyTorch's powerSGD_hook, rank {rank}"] = (ONE_BUCKET, partial(with_torch, rank=rank))
        ways[f"commhub powersgd, rank {rank}"] = (ONE_BUCKET, ours)
        compare(ways, given.width, given.layers, given.steps)
        ways.clear()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
