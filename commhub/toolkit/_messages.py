"""One bucket on its way: from numbers to the bytes of two messages, and back. All memory is kept between steps.

The first message has a share for every rank, which sums it; the second is this rank's share of the mean. A share
holds, for each section, codes and then scales, and at its end a part of what is not compressed, if that travels there.
Each of these begins at a multiple of 16 bytes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ._batches import add_in_order, batches
from ._part import Part, Place
from ._pieces import part_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from ._codec import Codec
    from ._layout import Section, Stretch


class Uncoded:
    """What of a bucket is not compressed, and travels in the two messages all the same, in full."""

    def __init__(
        self, stretches: Sequence[Stretch], byte: int, p: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._stretches = stretches
        count = -(-sum(stretch.length for stretch in stretches) // p)
        self._memory = torch.zeros(p, count, dtype=dtype, device=device)
        self.at = Place(byte, 1, count, dtype)

    def __bool__(self) -> bool:
        return bool(self._memory.numel())

    def fill(self, values: Tensor, shares: Tensor, divisor: int) -> None:
        """Write the mean's part into the first message."""
        for run, memory in self._runs(values):
            torch.mul(run, 1.0 / divisor, out=memory)
        self._in(shares).copy_(self._memory)

    def sum(self, received: Tensor, out: Tensor) -> None:
        """Add up what all ranks sent for this share, in their order, in the second message."""
        total, terms = self.at.within(out).view(-1).zero_(), self._in(received)
        for some in batches(len(terms), total.nbytes):
            add_in_order(total, terms[some], adding=True)

    def take(self, gathered: Tensor, values: Tensor) -> None:
        """Write the result into ``values``."""
        self._memory.copy_(self._in(gathered))
        for run, memory in self._runs(values):
            run.copy_(memory)

    def _in(self, shares: Tensor) -> Tensor:
        """A view of the part in each share, (p, elements)."""
        return self.at.within(shares).squeeze(1)

    def _runs(self, values: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        flat, start = self._memory.view(-1), 0
        for stretch in self._stretches:
            yield part_of(values, stretch), flat.narrow(0, start, stretch.length)
            start += stretch.length


class Messages:
    """A bucket's sections and messages.

    Args:
        sections: what is compressed, and how.
        uncoded: what else is in the messages.
        rank, p: this rank among how many.
        dtype: in which the bucket is worked on: its own, or float32 for one of 16 bits.
    """

    def __init__(
        self, sections: Sequence[tuple[Codec, Section]], uncoded: Sequence[Stretch], *,
        rank: int, p: int, dtype: torch.dtype, device: torch.device,
    ) -> None:  # fmt: skip
        self._dtype = dtype
        self._copy: Tensor | None = None
        self.parts: list[Part] = []
        size = 0
        for codec, section in sections:
            self.parts.append(Part(codec, section, size, rank, dtype, device))
            size = self.parts[-1].scales_at.end
        self._uncoded = Uncoded(uncoded, size, p, dtype, device)
        size = self._uncoded.at.end
        self.message = torch.zeros(p, size, dtype=torch.uint8, device=device)
        self.share = torch.zeros(size, dtype=torch.uint8, device=device)

    def working_copy(self, flat: Tensor) -> Tensor:
        """The bucket's elements in the dtype that they are worked on in: ``flat`` itself, or a copy."""
        if flat.dtype == self._dtype:
            return flat
        if self._copy is None:
            self._copy = torch.empty_like(flat, dtype=self._dtype)
        return self._copy.copy_(flat)

    def fill(self, values: Tensor, divisor: int) -> None:
        """Write the first message: the codes, and the mean's part of what is not compressed."""
        for part in self.parts:
            part.fill(self.message)
        if self._uncoded:
            self._uncoded.fill(values, self.message, divisor)

    def sum(self, received: Tensor, divisor: int) -> None:
        """Average what all ranks sent for this share, in their order; what is not coded into the second message."""
        shares = received.view(self.message.shape)
        for part in self.parts:
            part.sum(shares, divisor)
        if self._uncoded:
            self._uncoded.sum(shares, self.share)

    def finite(self, gathered: Tensor, dtype: torch.dtype) -> Tensor:
        """Whether the mean is finite in ``dtype``: 0-dim bool. A row that is not finite has a scale that is not."""
        shares = gathered.view(self.message.shape)
        places = [part.scales_at for part in self.parts] + [self._uncoded.at] * bool(self._uncoded)
        extremes = [
            extreme
            for place in places
            for some in batches(len(shares), place.size)
            for extreme in torch.aminmax(place.within(shares[some]))
        ]
        return torch.isfinite(torch.stack(extremes).to(dtype)).all()

    def take(self, gathered: Tensor, values: Tensor) -> None:
        """Write the result into ``values``."""
        shares = gathered.view(self.message.shape)
        for part in self.parts:
            part.take(shares, values)
        if self._uncoded:
            self._uncoded.take(shares, values)
