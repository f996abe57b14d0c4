"""Time one bucket of PowerSGD against PyTorch's own hook: one rank, one thread, Gloo, steps interleaved, medians.

    python against_torch.py [--mib 25] [--width 1024] [--steps 40]

Each line gives the milliseconds that a hook adds to a bare DDP backward of the same model, and their ratio.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

import commhub


class Matrices(nn.Module):
    """Square matrices and vectors whose gradients are noise, cheaply."""

    def __init__(self, mib: int, width: int) -> None:
        super().__init__()
        shapes = [(width, width), (width,)] * round(mib * 2**18 / width / (width + 1))
        self.parts = nn.ParameterList([torch.zeros(shape) for shape in shapes])
        self.noise = [torch.randn(shape) for shape in shapes]

    def forward(self) -> Tensor:
        """A scalar whose gradient is the noise."""
        return torch.stack([(p * n).sum() for p, n in zip(self.parts, self.noise, strict=True)]).sum()


def model(mib: int, width: int) -> DistributedDataParallel:
    """All of it in one bucket."""
    return DistributedDataParallel(Matrices(mib, width), bucket_cap_mb=10 * mib)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=25)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--cpu", action="store_true", help="CPU time instead of wall time, for a busy machine")
    arguments = parser.parse_args()
    clock = time.process_time if arguments.cpu else time.perf_counter
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    print(f"{'rank':>4} {'bare':>8} {'torch +':>8} {'commhub +':>9} {'ratio':>6}")
    for rank in (1, 2, 4):
        bare, theirs, ours = (model(arguments.mib, arguments.width) for _ in range(3))
        theirs.register_comm_hook(PowerSGDState(None, rank, start_powerSGD_iter=2), powerSGD_hook)
        commhub.register(ours, "powersgd", rank=rank, start_step=2)
        seconds: dict[int, list[float]] = {id(m): [] for m in (bare, theirs, ours)}
        for step in range(arguments.steps + 5):
            for one in (bare, theirs, ours):
                loss = one()
                began = clock()
                loss.backward()
                if step >= 5:
                    seconds[id(one)].append(clock() - began)
        base, torchs, own = (statistics.median(seconds[id(m)]) * 1e3 for m in (bare, theirs, ours))
        print(f"{rank:>4} {base:8.1f} {torchs - base:8.1f} {own - base:9.1f} {(own - base) / (torchs - base):6.2f}")


if __name__ == "__main__":
    main()
