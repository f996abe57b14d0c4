"""Groups of numbers as one bit each and a scale, and back."""

from __future__ import annotations

import torch
from torch import Tensor


def encode(groups: Tensor, counts: Tensor) -> Tensor:
    """Bytes of groups (n, size): (n, size / 8 + bytes of a scale), uint8: signs, then the mean absolute value.

    Args:
        groups: floating; zero where the last one is filled up.
        counts: (n, 1), how many numbers of each are not filling.

    A bit says that a number is below zero, so that zero counts as positive. Scales are in the groups' dtype.
    """
    scale = groups.abs().sum(1, keepdim=True) / counts
    weights = 1 << torch.arange(8, dtype=torch.uint8, device=groups.device)
    bits = (groups < 0).view(len(groups), -1, 8)
    signs = (bits * weights).sum(2, dtype=torch.uint8)
    return torch.cat([signs, scale.view(torch.uint8)], 1)


def decode(coded: Tensor, dtype: torch.dtype) -> Tensor:
    """What ``encode`` made, as scale times sign: (n, size), in ``dtype``, that of the groups."""
    scale = coded[:, -dtype.itemsize :].contiguous().view(dtype)
    shifts = torch.arange(8, dtype=torch.uint8, device=coded.device)
    bits = (coded[:, : -dtype.itemsize].unsqueeze(2) >> shifts) & 1
    return (1 - 2 * bits.view(len(coded), -1).to(dtype)) * scale
