"""A whole training script with a hook, on two ranks of this machine.

Run it with: torchrun --nproc-per-node 2 docs/examples/train.py "powersgd_rank2(start_step=0)"
"""

import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import commhub


def main(hook: str) -> None:
    """Train a small network to shift its input by one place."""
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 256), nn.Tanh(), nn.Linear(256, 64))
    model = DistributedDataParallel(net)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    registration = commhub.register(model, hook)  # the one line

    generator = torch.Generator().manual_seed(dist.get_rank())
    for step in range(50):
        x = torch.randn(32, 64, generator=generator)
        loss = (model(x) - x.roll(1, dims=1)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if dist.get_rank() == 0 and step % 10 == 9:
            sent, rate = registration.stats.last.sent_bytes, registration.stats.last.compression
            print(f"step {step + 1}  loss {loss.item():.3f}  sent {sent:.0f} bytes, {rate:.1f} times less than all")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "fp16")
