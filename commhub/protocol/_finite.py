"""Whether tensors hold numbers only: no Inf, no NaN."""

from __future__ import annotations

import cmath

import torch
from torch import Tensor


def is_number(tensor: Tensor) -> bool:
    """Whether it is of a floating or complex dtype, and so may hold what is no number."""
    return tensor.is_floating_point() or tensor.is_complex()


def all_finite(tensor: Tensor) -> Tensor:
    """Whether all elements are finite: 0-dim bool on the tensor's device; of integers, they are.

    It takes one pass, and nothing on a device waits for it. There a sum is looked at, and finite elements whose sum is
    beyond the range of float32 count as not finite; on the host the answer is exact.
    """
    if tensor.is_sparse:
        tensor = tensor._values()
    if not is_number(tensor):
        return torch.ones((), dtype=torch.bool, device=tensor.device)
    if tensor.itemsize == 1:  # sums and promotion are not there for these
        tensor = tensor.to(torch.float32)
    total = tensor.sum(dtype=torch.promote_types(tensor.dtype, torch.float32))
    if total.device.type != "cpu":
        return torch.isfinite(total)
    finite = cmath.isfinite(total.item()) or bool(torch.isfinite(tensor).all())
    return torch.tensor(finite)
