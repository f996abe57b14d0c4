"""Models of as many buckets as one asks for, and a step of them."""

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel


def build(buckets):
    torch.manual_seed(0)
    layers = [torch.nn.Linear(16, 16) for _ in range(buckets)]
    return DistributedDataParallel(torch.nn.Sequential(*layers), bucket_cap_mb=0.001)


def backward(model, step):
    model.zero_grad()
    x = torch.randn(4, 16, generator=torch.Generator().manual_seed(100 * step + dist.get_rank()))
    model(x).pow(2).mean().backward()
