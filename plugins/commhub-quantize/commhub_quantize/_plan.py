"""One bucket on its way: from numbers to the bytes of two messages, and back. All memory is kept between steps.

The first message has a share for every rank, which sums it; the second is this rank's share of the mean. A share
holds, for each section, codes and then marks, and at its end a part of what is not compressed. Each of these begins
at a multiple of 16 bytes.
"""

from __future__ import annotations

from math import gcd
from typing import TYPE_CHECKING

import attrs
import torch
from torch import Tensor

from ._rows import Rows

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from ._coding import Coding
    from ._layout import Lines, Section, Stretch
    from ._work import Work

_ALIGNMENT = 16


@attrs.frozen
class _Place:
    """Where something lies in a share: ``rows`` rows of ``width`` elements, from a byte on."""

    byte: int
    rows: int
    width: int
    dtype: torch.dtype

    def within(self, share: Tensor) -> Tensor:
        """A view of it in a share (1-D, uint8)."""
        size = self.rows * self.width * self.dtype.itemsize
        return share.narrow(0, self.byte, size).view(self.dtype).view(self.rows, self.width)


class Part:
    """One section's way through the two messages."""

    def __init__(self, section: Section, work: Work, rank: int, dtype: torch.dtype, device: torch.device) -> None:
        coding, parameters = section.coding, len(section.lines)
        self.section = section
        self.owned: tuple[Lines, ...] = section.owned[rank]
        parameter = torch.tensor(section.parameters(), device=device)
        self.shares = torch.tensor(section.shares, device=device)
        self.rows = Rows(coding, work, parameter, parameters, dtype)
        self.own_rows = Rows(coding, work, parameter[self.shares[rank]], parameters, dtype)
        self.own = torch.zeros(section.share_rows, coding.row, dtype=dtype, device=device)
        self.code_place = self.mark_place = _Place(0, 0, 0, torch.int8)
        self._short = torch.zeros(len(section.short), coding.row, dtype=dtype, device=device)
        self._noise: dict[bool, Tensor] = {}

    def noise(self, *, own: bool) -> Tensor:
        """Memory for one number for each element of all rows, or of this rank's share; zero at first."""
        if own not in self._noise:
            rows = len(self.own) if own else self.section.rows
            self._noise[own] = self.own.new_zeros(rows, self.section.coding.row)
        return self._noise[own]

    def lie_at(self, byte: int) -> int:
        """Choose places from ``byte`` on in a share; returns where they end."""
        coding, rows = self.section.coding, self.section.share_rows
        marks = len(self.rows.table) if coding.whole else rows
        self.code_place = _Place(byte, rows, coding.row_bytes, torch.int8)
        self.mark_place = _Place(_aligned(byte + rows * coding.row_bytes), marks, coding.marks, self.rows.marks.dtype)
        return _aligned(self.mark_place.byte + marks * coding.marks * self.rows.marks.itemsize)

    def pieces(self, values: Tensor) -> Iterator[tuple[Tensor, slice]]:
        """Views of ``values`` (1-D, the bucket's elements) as rows, and which; the short ones stand apart."""
        row = 0
        for stretch in self.section.full:
            view = part_of(values, stretch).view(-1, self.section.coding.row)
            yield view, slice(row, row + len(view))
            row += len(view)
        if len(self._short):
            yield self._short, slice(row, row + len(self._short))

    def encode(self, values: Tensor, noise: Tensor | None, *, keeping: bool) -> None:
        """Code all rows of ``values``. With ``keeping``, they hold afterwards what the codes miss."""
        for line, stretch in zip(self._short, self.section.short, strict=True):
            line[: stretch.length].copy_(part_of(values, stretch))
            line[stretch.length :].zero_()  # not zero after a step that was not finite
        self.rows.encode([*self.pieces(values)], noise, keeping=keeping)
        if keeping:
            self._put_short(values)

    def encode_own(self, noise: Tensor | None, *, keeping: bool) -> None:
        """Code this rank's share of the mean. With ``keeping``, ``own`` holds afterwards what the codes miss."""
        self.own_rows.encode([(self.own, slice(0, len(self.own)))], noise, keeping=keeping)

    def fill(self, shares: Tensor) -> None:
        """Write the first message, (p, bytes of a share)."""
        for share, rows in zip(shares, self.shares, strict=True):
            torch.index_select(self.rows.codes, 0, rows, out=self.code_place.within(share))
            marks = self.mark_place.within(share)
            if self.section.coding.whole:
                marks.copy_(self.rows.table)
            else:
                torch.index_select(self.rows.marks, 0, rows, out=marks)

    def fill_own(self, share: Tensor) -> None:
        """Write the second message."""
        self.code_place.within(share).copy_(self.own_rows.codes)
        whole = self.section.coding.whole
        self.mark_place.within(share).copy_(self.own_rows.table if whole else self.own_rows.marks)

    def sum(self, received: Tensor, divisor: int) -> None:
        """Make ``own`` the mean of what all ranks sent, (p, bytes of a share), in their order."""
        for turn, share in enumerate(received):
            marks = self.mark_place.within(share)
            marks = marks[self.own_rows.parameter] if self.section.coding.whole else marks.clone()
            marks[:, :1].mul_(1.0 / divisor)
            self.own_rows.work.decode(self.code_place.within(share), marks, self.own, adding=turn > 0)

    def take(self, gathered: Tensor, values: Tensor) -> None:
        """Write the result of all shares, (p, bytes of a share), into ``values``."""
        for share, rows in zip(gathered, self.shares, strict=True):
            _in_words(self.rows.codes).index_copy_(0, rows, _in_words(self.code_place.within(share)))
            marks = self.mark_place.within(share)
            if self.section.coding.whole:
                marks = marks[self.rows.parameter[rows]]
            self.rows.marks.index_copy_(0, rows, marks)
        for view, rows in self.pieces(values):
            self.rows.work.decode(self.rows.codes[rows], self.rows.marks[rows], view, adding=False)
        self._put_short(values)

    def _put_short(self, values: Tensor) -> None:
        for line, stretch in zip(self._short, self.section.short, strict=True):
            part_of(values, stretch).copy_(line[: stretch.length])


class Plan:
    """A bucket's sections and messages.

    Args:
        sections: what is compressed.
        work: codes it, by coding.
        dense: what is not.
        rank, p: this rank among how many.
        dtype: in which the bucket is worked on: its own, or float32 for one of 16 bits.
    """

    def __init__(
        self, sections: Sequence[Section], work: Mapping[Coding, Work], dense: Sequence[Stretch], *,
        rank: int, p: int, dtype: torch.dtype, device: torch.device,
    ) -> None:  # fmt: skip
        self.parts = [Part(section, work[section.coding], rank, dtype, device) for section in sections]
        self._stretches = dense
        self._dtype = dtype
        self._copy: Tensor | None = None
        count = -(-sum(stretch.length for stretch in dense) // p)
        size = 0
        for part in self.parts:
            size = part.lie_at(size)
        self._dense = torch.zeros(p, count, dtype=dtype, device=device)
        self._dense_place = _Place(size, 1, count, dtype)
        size = _aligned(size + count * dtype.itemsize)
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
        for run, place in self._dense_runs(values):
            torch.mul(run, 1.0 / divisor, out=place)
        for share, dense in zip(self.message, self._dense, strict=True):
            self._dense_place.within(share).copy_(dense)

    def sum(self, received: Tensor, divisor: int) -> None:
        """Average what all ranks sent for this share, in their order; the dense part into the second message."""
        shares = received.view(self.message.shape)
        for part in self.parts:
            part.sum(shares, divisor)
        total = self._dense_place.within(self.share).zero_()
        for share in shares:
            total.add_(self._dense_place.within(share))

    def finite(self, gathered: Tensor) -> Tensor:
        """Whether the mean is finite: 0-dim bool. A row that is not finite has marks that are not."""
        shares = gathered.view(self.message.shape)
        places = [part.mark_place for part in self.parts] + [self._dense_place] * bool(self._dense.numel())
        extremes = [extreme for share in shares for place in places for extreme in torch.aminmax(place.within(share))]
        return torch.isfinite(torch.stack(extremes)).all()

    def take(self, gathered: Tensor, values: Tensor) -> None:
        """Write the result into ``values``."""
        shares = gathered.view(self.message.shape)
        for part in self.parts:
            part.take(shares, values)
        for share, dense in zip(shares, self._dense, strict=True):
            dense.copy_(self._dense_place.within(share)[0])
        for run, place in self._dense_runs(values):
            run.copy_(place)

    def _dense_runs(self, values: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        flat, start = self._dense.view(-1), 0
        for stretch in self._stretches:
            yield part_of(values, stretch), flat.narrow(0, start, stretch.length)
            start += stretch.length


def part_of(values: Tensor, stretch: Stretch) -> Tensor:
    """The elements of ``values`` (1-D) that a stretch means."""
    return values.narrow(0, stretch.offset, stretch.length)


def _in_words(codes: Tensor) -> Tensor:
    """The same rows in the widest elements that fit: byte by byte, putting rows in their places takes far longer."""
    words = {4: torch.int32, 8: torch.int64, 16: torch.complex128}
    return codes.view(words[gcd(codes.shape[1], 16)])


def _aligned(byte: int) -> int:
    return -(-byte // _ALIGNMENT) * _ALIGNMENT
