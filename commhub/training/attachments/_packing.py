"""How gradients that no reducer has laid out lie in buckets."""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs
import torch
from torch import nn

from commhub.protocol._spans import lay_out
from commhub.training._trained import nbytes_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from commhub.protocol._spans import Span
    from commhub.training._trained import Named

BUCKET_BYTES = 25 * 2**20
"""The size at which a bucket is full, DDP's own default."""


@attrs.frozen(eq=False)
class Packed:
    """The parameters of one bucket, and how their gradients lie in it."""

    parameters: tuple[Tensor, ...]
    spans: tuple[Span, ...]
    dtype: torch.dtype

    def empty(self, device: torch.device) -> tuple[Tensor, list[Tensor]]:
        """A bucket of zeros, and views of it, one for each parameter."""
        flat = torch.zeros(sum(s.numel for s in self.spans), dtype=self.dtype, device=device)
        return flat, [flat.as_strided(s.shape, s.stride, s.offset) for s in self.spans]


def sparse_in(module: nn.Module) -> set[int]:
    """The parameters whose gradients are sparse, by identity, told as DDP tells them."""
    kinds = (nn.Embedding, nn.EmbeddingBag)
    return {id(m.weight) for m in module.modules() if isinstance(m, kinds) and m.sparse}


def pack(parameters: Sequence[Named]) -> list[Packed]:
    """Buckets of one dtype each, last parameters first, as backward makes their gradients."""
    buckets: list[list[tuple[str, Tensor]]] = []
    size = 0
    for name, parameter in reversed(parameters):
        nbytes = nbytes_of(name, parameter)
        fits = buckets and size + nbytes <= BUCKET_BYTES and buckets[-1][0][1].dtype == parameter.dtype
        if not fits:
            buckets.append([])
            size = 0
        buckets[-1].append((name, parameter))
        size += nbytes
    made = []
    for bucket in buckets:
        names, tensors = zip(*bucket, strict=True)
        made.append(Packed(tensors, lay_out(names, tensors), tensors[0].dtype))
    return made
