"""Whether tensors are still what they were: told from their versions, their memory and their bits."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

_ROW = 1024
"""64-bit integers that are added up together; what is smaller is copied."""


class Snapshot:
    """What tensors are at one moment, and whether they are so at another.

    A write in place counts a tensor's version up, and other memory in its stead has another address. A write through
    ``.data`` does neither; to see it, the tensors' bits are read as well.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors = tuple(tensors)
        self._marks: list[tuple[int, int]] | None = None
        self._bits: list[Tensor] | None = None
        self._memory = _Memory((), ())

    @classmethod
    def now(cls, tensors: Sequence[Tensor]) -> Snapshot:
        """What the tensors are now, without their bits."""
        place = cls(tensors)
        place.keep(bits=False)
        return place

    def is_of(self, tensors: Sequence[Tensor]) -> bool:
        """Whether it is of these tensors and no others."""
        return list(map(id, self._tensors)) == list(map(id, tensors))

    def keep(self, *, bits: bool) -> None:
        """Note what the tensors are, unless it is noted; their bits too, unless they have changed already."""
        now = _marks(self._tensors)
        if self._marks is None:
            self._marks = now
        if bits and self._bits is None and self._marks == now:
            addresses = tuple(address for _, address in now)
            if self._memory.addresses != addresses:
                self._memory = _Memory(self._tensors, addresses)
            self._bits = self._memory.read()

    def forget(self) -> None:
        """Note nothing more of what the tensors were."""
        self._marks = self._bits = None

    def holds(self) -> bool:
        """Whether nothing has written to the tensors since, as far as was noted."""
        if self._marks is None:
            return True
        if self._marks != _marks(self._tensors):
            return False
        return self._bits is None or all(map(torch.equal, self._bits, self._memory.read()))


def bits(tensors: Sequence[Tensor]) -> list[Tensor]:
    """What is another if any bit of the tensors is: a few of their bytes and sums of the others."""
    return _Memory(tensors, ()).read()


def _marks(tensors: Sequence[Tensor]) -> list[tuple[int, int]]:
    return [(tensor._version, tensor.data_ptr()) for tensor in tensors]


class _Memory:
    """The memory of tensors, to be read often and fast: rows of it are added up, exactly, and the rest is copied."""

    def __init__(self, tensors: Sequence[Tensor], addresses: tuple[int, ...]) -> None:
        self.addresses = addresses
        self._rows: list[Tensor] = []
        self._rest: list[Tensor] = []
        self._gaps: list[Tensor] = []
        for tensor in tensors:
            value = tensor.detach()
            if type(value) is not torch.Tensor:
                continue  # of a kind of its own, whose memory is its own affair
            order = sorted(range(value.dim()), key=value.stride, reverse=True)
            flat = value.permute(order)
            if flat.is_contiguous():
                self._divide(flat.view(-1).view(torch.uint8))
            else:
                self._gaps.append(value)

    def _divide(self, raw: Tensor) -> None:
        first = -raw.storage_offset() % 8  # where 64-bit integers may begin
        count = max(raw.numel() - first, 0) // (8 * _ROW)
        last = first + 8 * _ROW * count if count else first
        if count:
            self._rows.append(raw[first:last].view(torch.int64).view(count, _ROW))
        self._rest += [part for part in (raw[:first], raw[last:]) if part.numel()]

    def read(self) -> list[Tensor]:
        """What is another if any bit is."""
        found = [rows.sum(1) for rows in self._rows]
        rest = [*self._rest, *(gap.contiguous().view(-1).view(torch.uint8) for gap in self._gaps)]
        if rest:
            found.append(torch.cat(rest))
        return found
