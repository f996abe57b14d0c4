"""Parameters that are coded alike, on their way through the two messages. All memory is kept between steps."""

from __future__ import annotations

from itertools import accumulate
from math import gcd
from typing import TYPE_CHECKING

import attrs
import torch
from torch import Tensor

from ._batches import add_in_order, batches
from ._indices import indices
from ._pieces import Pieces
from ._rows import Rows

if TYPE_CHECKING:
    from ._codec import Codec
    from ._layout import Lines, Section

_ALIGNMENT = 16


@attrs.frozen
class Place:
    """Where something lies in a share: ``rows`` rows of ``width`` elements, from a byte on."""

    byte: int
    rows: int
    width: int
    dtype: torch.dtype

    @property
    def end(self) -> int:
        """The byte from which on something else may lie."""
        return -(-(self.byte + self.size) // _ALIGNMENT) * _ALIGNMENT

    @property
    def size(self) -> int:
        """In bytes."""
        return self.rows * self.width * self.dtype.itemsize

    def within(self, share: Tensor) -> Tensor:
        """A view of it in a share (uint8), or in each of several: (..., bytes of a share), to (..., rows, width)."""
        return share.narrow(-1, self.byte, self.size).view(self.dtype).view(*share.shape[:-1], self.rows, self.width)


class Part:
    """One section's way through the two messages."""

    def __init__(
        self, codec: Codec, section: Section, byte: int, rank: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        parameters = len(section.lines)
        self.section, self.codec = section, codec
        self.owned: tuple[Lines, ...] = section.owned[rank]
        made = indices(section, device)
        parameter, counts, self._shares = made.parameters, made.counts, made.shares
        self._pieces = Pieces(section, dtype, device)
        self._rows = Rows(codec, parameter, parameters, dtype, self._pieces.runs())
        mine = self._shares[rank]
        self._own_rows = Rows(codec, parameter[mine], parameters, dtype, [(len(mine), counts[mine])])
        self.own = torch.zeros(section.share_rows, codec.row, dtype=dtype, device=device)
        ends = accumulate(len(line.rows) for line in self.owned)
        filled = [len(line.rows) * codec.row - line.stretch.length for line in self.owned]
        self._owns = sum(len(line.rows) for line in self.owned)  # the rows after these are none's
        self._filling = [self.own[end - 1, -n:] for end, n in zip(ends, filled, strict=True) if n]
        self._filling.append(self.own[self._owns :])
        self._noise: dict[bool, Tensor] = {}
        rows, table = section.share_rows, self._rows.table
        self._codes_at = Place(byte, rows, codec.row_bytes(dtype), self._rows.codes.dtype)
        self.scales_at = Place(self._codes_at.end, rows if table is None else len(table), codec.scales, dtype)

    def noise(self, *, own: bool) -> Tensor:
        """Memory for one number for each element of all rows, or of this rank's share; zero at first."""
        if own not in self._noise:
            rows = len(self.own) if own else self.section.rows
            self._noise[own] = self.own.new_zeros(rows, self.codec.row)
        return self._noise[own]

    def encode(self, values: Tensor, noise: Tensor | None, *, keeping: bool) -> None:
        """Code all rows of ``values``. With ``keeping``, they hold afterwards what the codes miss."""
        self._pieces.take_short(values)
        self._rows.encode(self._pieces.of(values), noise, keeping=keeping)
        if keeping:
            self._pieces.put_short(values)

    def encode_own(self, noise: Tensor | None, *, keeping: bool) -> None:
        """Code this rank's share of the mean. With ``keeping``, ``own`` holds afterwards what the codes miss."""
        for filling in self._filling:
            filling.zero_()  # whatever the codes stand for there is no part of the mean
        self._own_rows.encode([self.own], noise, keeping=keeping)

    def fill(self, shares: Tensor) -> None:
        """Write the first message, (p, bytes of a share)."""
        codes, scales, table = self._rows.codes, self._rows.scales, self._rows.table
        for some in batches(len(shares), self._codes_at.size):
            rows = self._shares[some]
            _select(codes, rows, self._codes_at.within(shares[some]))
            if table is None:
                _select(scales, rows, self.scales_at.within(shares[some]))
        if table is not None:
            self.scales_at.within(shares).copy_(table)

    def fill_own(self, share: Tensor) -> None:
        """Write the second message."""
        mine = self._own_rows
        self._codes_at.within(share).copy_(mine.codes)
        self.scales_at.within(share).copy_(mine.scales if mine.table is None else mine.table)

    def sum(self, received: Tensor, divisor: int) -> None:
        """Make ``own`` the mean of what all ranks sent, (p, bytes of a share), in their order."""
        mine, owns = self._own_rows, self._owns
        own, parameter = self.own[:owns], mine.parameter[:owns]
        for some in batches(len(received), own.nbytes) if owns else ():
            codes = self._codes_at.within(received[some])[:, :owns]
            scales = self.scales_at.within(received[some])
            scales = scales[:, :owns].clone() if mine.table is None else scales[:, parameter]
            scales[..., :1].mul_(1.0 / divisor)
            if len(codes) == 1:
                self.codec.decode(codes[0], scales[0], own, adding=some.start > 0)
            else:
                values = own.new_empty(len(codes) * owns, self.codec.row)
                self.codec.decode(_in_one(codes), _in_one(scales), values, adding=False)
                add_in_order(own.view(-1), values.view(len(codes), -1), adding=some.start > 0)

    def take(self, gathered: Tensor, values: Tensor) -> None:
        """Write the result of all shares, (p, bytes of a share), into ``values``."""
        all_rows = self._rows
        for some in batches(len(gathered), self._codes_at.size):
            rows = self._shares[some]
            codes, scales = self._codes_at.within(gathered[some]), self.scales_at.within(gathered[some])
            if all_rows.table is not None:
                share = torch.arange(len(rows), device=rows.device)[:, None]
                scales = scales[share, all_rows.parameter[rows]]
            _in_words(all_rows.codes).index_copy_(0, rows.flatten(), _in_one(_in_words(codes)))
            all_rows.scales.index_copy_(0, rows.flatten(), _in_one(scales))
        all_rows.decode(self._pieces.of(values))
        self._pieces.put_short(values)


def _select(rows: Tensor, places: Tensor, out: Tensor) -> None:
    """Write the rows of these places (n, k) into ``out`` (n, k, width)."""
    if len(out) == 1:
        torch.index_select(rows, 0, places[0], out=out[0])
    else:
        out.copy_(rows.index_select(0, places.flatten()).view(out.shape))


def _in_one(shares: Tensor) -> Tensor:
    """The rows of several shares (n, k, width) one after another, contiguous; of a single one in place."""
    return shares.reshape(-1, shares.shape[-1]).contiguous()


def _in_words(codes: Tensor) -> Tensor:
    """The same rows in the widest elements that fit: byte by byte, putting rows in their places takes far longer."""
    words = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}
    return codes.view(words[gcd(codes.shape[-1], 16)])
