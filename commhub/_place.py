"""Whether tensors are still what they were: told from their versions, their memory and their bits."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

_ROW = 1024
"""Words of 8 bytes that are added up together."""


class Place:
    """What tensors are at one moment.

    A write in place counts a tensor's version up, and another tensor's memory in its stead has another address. A write
    through ``.data`` does neither; ``add_sums`` makes it seen, at the cost of reading the tensors once.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors = tuple(tensors)
        self._marks = _marks(self._tensors)
        self._sums: list[Tensor] | None = None

    def add_sums(self) -> None:
        """Note the tensors' bits too, unless they were noted or the tensors have changed already."""
        if self._sums is None and self._marks == _marks(self._tensors):
            self._sums = _sums(self._tensors)

    def holds(self) -> bool:
        """Whether nothing has written to the tensors since, as far as was noted."""
        if self._marks != _marks(self._tensors):
            return False
        return self._sums is None or all(map(torch.equal, self._sums, _sums(self._tensors)))


def _marks(tensors: Sequence[Tensor]) -> list[tuple[int, int]]:
    return [(tensor._version, tensor.data_ptr()) for tensor in tensors]


def _sums(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Sums of the tensors' bits as 64-bit integers, of each row of them and of what is left: exact, as they wrap."""
    sums = []
    for tensor in tensors:
        words, rest = _words(tensor.detach())
        rows = words.numel() // _ROW
        if rows > 1:
            sums.append(words[: rows * _ROW].view(rows, _ROW).sum(1))
            words = words[rows * _ROW :]
        sums.append(words.sum())
        if rest is not None:
            sums.append(rest.sum())
    return sums


def _words(tensor: Tensor) -> tuple[Tensor, Tensor | None]:
    """A tensor's memory as 64-bit integers, and the bytes behind the last of them."""
    if tensor.is_contiguous():
        flat = tensor.view(-1)
    else:
        order = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
        flat = tensor.permute(order).reshape(-1)  # a view, where the memory has no gaps
    size, odd = flat.nbytes, flat.nbytes % 8
    if not odd and not flat.storage_offset() * flat.itemsize % 8:
        return flat.view(torch.int64), None
    if flat.storage_offset() * flat.itemsize % 8:
        flat = flat.clone()
    raw = flat.view(torch.uint8)
    return raw[: size - odd].view(torch.int64), raw[size - odd :]
