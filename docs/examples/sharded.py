"""A transformer that FSDP2 shards, on four ranks of this machine.

With a hook between two replicas of two shards each:
    torchrun --nproc-per-node 4 docs/examples/sharded.py "powersgd(rank=4, start_step=0)" 2
In place of the reduce-scatter of four shards:
    torchrun --nproc-per-node 4 docs/examples/sharded.py quantize_per_channel 4
"""

import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import commhub

WORDS, WIDTH = 64, 32


class Model(nn.Module):
    """Tells each word from the one before; the output is the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, WIDTH)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, dropout=0.0, batch_first=True) for _ in range(2)
        )
        self.head = nn.Linear(WIDTH, WORDS)

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        """Shape (rows, length), int64, to a scalar."""
        x = self.embedding(words[:, :-1])
        for block in self.blocks:
            x = block(x)
        return nn.functional.cross_entropy(self.head(x).flatten(0, 1), words[:, 1:].flatten())


def main(hook: str, shards: int) -> None:
    """Train on sequences in which each word is the one before plus three."""
    dist.init_process_group("gloo")
    replicas = dist.get_world_size() // shards
    mesh = init_device_mesh("cpu", (replicas, shards), mesh_dim_names=("replicate", "shard"))
    torch.manual_seed(0)
    model = Model()
    for block in model.blocks:
        fully_shard(block, mesh=mesh["shard"])
    fully_shard(model, mesh=mesh["shard"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)

    exchange = mesh["replicate"] if replicas > 1 else mesh["shard"]
    registration = commhub.register(model, hook, process_group=exchange)  # the one line

    generator = torch.Generator().manual_seed(dist.get_rank())
    for step in range(30):
        first = torch.randint(WORDS, (16, 1), generator=generator)
        words = (first + 3 * torch.arange(9)) % WORDS
        loss = model(words)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if dist.get_rank() == 0 and step % 10 == 9:
            sent, rate = registration.stats.last.sent_bytes, registration.stats.last.compression
            print(f"step {step + 1}  loss {loss.item():.3f}  sent {sent:.0f} bytes, {rate:.1f} times less than all")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "fp16", int(sys.argv[2]) if len(sys.argv) > 2 else 2)
