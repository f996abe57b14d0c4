"""Virtual ranks' tensors as buckets: averaged whole, or scattered as a sharded model's are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from commhub._errors import HookOptionError
from commhub.protocol._bucket import Bucket
from commhub.protocol._spans import lay_out, lay_out_parts

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from commhub.protocol._spans import Span


class Whole:
    """Each rank gets the average of all tensors."""

    def spans(self, names: Sequence[str], tensors: Sequence[Tensor]) -> tuple[Span, ...]:
        """Where they lie, one after another."""
        return lay_out(names, tensors)

    def bucket(self, names: Sequence[str], tensors: Sequence[Tensor], **about: Any) -> Bucket:
        """A bucket that holds a copy of them."""
        spans = self.spans(names, tensors)
        flat = torch.empty(sum(s.numel for s in spans), dtype=tensors[0].dtype, device=tensors[0].device)
        bucket = Bucket(flat=flat, parameters=tuple(tensors), used=(True,) * len(tensors), spans=spans, **about)
        for view, tensor in zip(bucket.gradients, tensors, strict=True):
            view.copy_(tensor)
        return bucket

    def results(self, bucket: Bucket) -> Sequence[Tensor]:
        """What has become of them on this rank; views of the bucket."""
        return bucket.gradients

    def result(self, tensor: Tensor, rank: int) -> Tensor:  # noqa: ARG002 - all ranks get all of it
        """Memory for what a rank gets of one of them."""
        return torch.empty_like(tensor)


class Parted:
    """Each rank gets its rows of the average: the first ranks equal numbers of them, the others what is left.

    Args:
        p: ranks.
    """

    def __init__(self, p: int) -> None:
        self._p = p

    def spans(self, names: Sequence[str], tensors: Sequence[Tensor]) -> tuple[Span, ...]:
        """Where their pieces lie in each rank's part.

        Raises:
            HookOptionError: for a tensor without dimensions.
        """
        for name, tensor in zip(names, tensors, strict=True):
            if not tensor.dim():
                raise HookOptionError(f"tensor {name} has no dimension to be sharded by. Give it one.")
        return lay_out_parts(names, [(self._rows(t), *t.shape[1:]) for t in tensors], self._p)

    def bucket(self, names: Sequence[str], tensors: Sequence[Tensor], **about: Any) -> Bucket:
        """A bucket that holds a copy of them, padded with zeros."""
        spans = self.spans(names, tensors)
        flat = tensors[0].new_zeros(sum(s.numel for s in spans))
        shard = torch.empty_like(flat[: flat.numel() // self._p])
        rank: int = about["rank"]
        parameters = tuple(self._part(tensor, rank) for tensor in tensors)
        used = (True,) * len(tensors)
        bucket = Bucket(flat=flat, shard=shard, parameters=parameters, used=used, spans=spans, **about)
        for view, tensor in zip(bucket.gradients, tensors, strict=True):
            rows = view.shape[1]
            full, rest = divmod(len(tensor), rows) if rows else (0, 0)
            view[:full].copy_(tensor[: full * rows].reshape(full, *view.shape[1:]))
            if rest:
                view[full, :rest] = tensor[full * rows :]
        return bucket

    def results(self, bucket: Bucket) -> Sequence[Tensor]:
        """What this rank has got; views of the bucket."""
        assert bucket.shard is not None
        pieces = bucket.shard.split([span.numel // self._p for span in bucket.spans])
        return [
            piece.view(span.shape[1:])[: len(own)]
            for piece, span, own in zip(pieces, bucket.spans, bucket.parameters, strict=True)
        ]

    def result(self, tensor: Tensor, rank: int) -> Tensor:
        """Memory for a rank's rows."""
        return torch.empty_like(self._part(tensor, rank))

    def _rows(self, tensor: Tensor) -> int:
        return -(-len(tensor) // self._p)

    def _part(self, tensor: Tensor, rank: int) -> Tensor:
        rows = self._rows(tensor)
        return tensor[rank * rows : (rank + 1) * rows]


def in_buckets(tensors: Sequence[Tensor], count: int) -> list[list[int]]:
    """Places of the tensors by bucket: last first, as backward produces them, one dtype each, about equal in number."""
    size = max(1, -(-len(tensors) // count))
    made: list[list[int]] = []
    for place in reversed(range(len(tensors))):
        fits = made and len(made[-1]) < size and tensors[made[-1][0]].dtype == tensors[place].dtype
        if fits:
            made[-1].append(place)
        else:
            made.append([place])
    return made
