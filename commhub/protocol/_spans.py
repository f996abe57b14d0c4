"""Where parameters' gradients lie in a bucket."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

import attrs
import torch

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch import Tensor


@attrs.frozen
class Span:
    """Where one parameter's gradient lies in a bucket: ``numel`` elements from ``offset``, with these strides."""

    name: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    numel: int


def lay_out(names: Sequence[str], tensors: Iterable[Tensor]) -> tuple[Span, ...]:
    """The spans of tensors that follow one another in a bucket, in their order.

    A tensor that fills its memory without gaps keeps its strides (channels_last, transposed); any other is
    contiguous in the bucket, as in PyTorch's reducer.
    """
    spans, offset = [], 0
    for name, tensor in zip(names, tensors, strict=True):
        dense = torch.empty_like(tensor, device="meta").stride()  # its own strides, unless there are gaps
        stride = dense if dense == tensor.stride() else torch.empty(tensor.shape, device="meta").stride()
        spans.append(Span(name, tuple(tensor.shape), tuple(stride), offset, tensor.numel()))
        offset += tensor.numel()
    return tuple(spans)


def lay_out_parts(names: Sequence[str], sizes: Sequence[Sequence[int]], p: int) -> tuple[Span, ...]:
    """The spans of parameters of which p parts, one after another, hold a contiguous piece of its size each.

    An offset is that in a part; shapes are (p, rows of a piece, ...).
    """
    width, spans, offset = sum(map(prod, sizes)), [], 0
    for name, size in zip(names, sizes, strict=True):
        stride = tuple(prod(size[i + 1 :]) for i in range(len(size)))
        spans.append(Span(name, (p, *size), (width, *stride), offset, p * prod(size)))
        offset += prod(size)
    return tuple(spans)
