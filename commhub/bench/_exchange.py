"""What the ranks of a bench tell each other, besides what hooks exchange. All of it is collective."""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from collections.abc import Sequence


def check_same_text(text: bytes, device: torch.device) -> None:
    """Make sure that every machine found the same text: losses could not be compared otherwise.

    Raises:
        ValueError: if one of them differs, on every rank.
    """
    digest = torch.tensor([len(text), zlib.crc32(text)], dtype=torch.int64, device=device)
    least, most = digest.clone(), digest.clone()
    dist.all_reduce(least, op=dist.ReduceOp.MIN)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    if not torch.equal(least, most):
        raise ValueError("the ranks found different texts: give the same --data on every machine")


def mean(values: Sequence[float], device: torch.device) -> list[float]:
    """The means of the ranks' values; it also makes them go on together."""
    total = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    means: list[float] = (total / dist.get_world_size()).tolist()
    return means


def any_of(here: bool, device: torch.device) -> bool:
    """Whether something is so on any rank."""
    return mean([float(here)], device)[0] > 0


def gather(text: str, device: torch.device) -> list[str]:
    """The texts of all ranks, in rank order."""
    own = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).to(device)
    lengths = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(dist.get_world_size())]
    dist.all_gather(lengths, torch.tensor([len(own)], device=device))
    longest = max(int(length) for length in lengths)
    padded = torch.cat([own, own.new_zeros(longest - len(own))])
    gathered = [torch.empty_like(padded) for _ in lengths]
    dist.all_gather(gathered, padded)
    return [bytes(each[: int(n)].tolist()).decode() for each, n in zip(gathered, lengths, strict=True)]
