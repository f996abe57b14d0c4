"""A bucket that is scattered, on its way as codes: each rank's part for itself, in one message. All memory is kept.

All parts are laid out alike, so that one section describes each of them. A share holds codes and scales of a part,
section after section, and at its end what of the part is not compressed, if that travels there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ._codec import code_dtype
from ._part import Place
from ._pieces import Pieces, part_of
from ._rows import Rows

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from ._codec import Codec
    from ._layout import Section, Stretch


class Coded:
    """The parameters that have the same codec, in every rank's part."""

    def __init__(self, codec: Codec, section: Section, byte: int, dtype: torch.dtype, device: torch.device) -> None:
        self.section, self.codec = section, codec
        self._dtype, self._pieces = dtype, Pieces(section, dtype, device)
        self._parameter = torch.tensor(section.parameters()[:-1], device=device)
        self._noise: Tensor | None = None
        scales = len(section.lines) + 1 if getattr(codec, "whole", False) else section.rows
        self._codes_at = Place(byte, section.rows, codec.row_bytes(dtype), code_dtype(codec))
        self._scales_at = Place(self._codes_at.end, scales, codec.scales, dtype)
        self._shares: list[Rows] = []

    @property
    def end(self) -> int:
        """The byte of a share from which on something else may lie."""
        return self._scales_at.end

    def settle(self, message: Tensor) -> None:
        """Write codes and scales into this message (p, bytes of a share) from now on."""
        for share in message:
            memory = self._codes_at.within(share), self._scales_at.within(share)
            rows = Rows(self.codec, self._parameter, len(self.section.lines), self._dtype, self._pieces.runs(), memory)
            self._shares.append(rows)

    @property
    def noise(self) -> Tensor:
        """Memory for one number for each element of a part's rows; zero at first."""
        if self._noise is None:
            shape = self.section.rows, self.codec.row
            self._noise = torch.zeros(shape, dtype=self._dtype, device=self._parameter.device)
        return self._noise

    def encode(self, part: Tensor, rank: int, noise: Tensor | None, *, keeping: bool) -> None:
        """Code a rank's part (1-D). With ``keeping``, it holds afterwards what the codes miss."""
        self._pieces.take_short(part)
        self._shares[rank].encode(self._pieces.of(part), noise, keeping=keeping)
        if keeping:
            self._pieces.put_short(part)

    def sum(self, received: Tensor, out: Tensor, divisor: int) -> None:
        """Leave in ``out`` (1-D) the mean of what all ranks sent, (p, bytes of a share), in their order."""
        runs = self._shares[0].runs
        for turn, share in enumerate(received):
            codes, scales = self._codes_at.within(share), self._scales_at.within(share)
            scales = scales.clone() if self._shares[0].table is None else scales[self._parameter]
            scales[:, :1].mul_(1.0 / divisor)
            for run, values in zip(runs, self._pieces.of(out), strict=True):
                self.codec.decode(codes[run.rows], scales[run.rows], values, adding=turn > 0)
        self._pieces.put_short(out)


class Scatter:
    """A bucket's one message.

    Args:
        sections: what is compressed, as it lies in a part, and how.
        uncoded: what else is in the message.
        p: ranks.
        dtype: in which the bucket is worked on: its own, or float32 for one of 16 bits.
    """

    def __init__(
        self, sections: Sequence[tuple[Codec, Section]], uncoded: Sequence[Stretch], *,
        p: int, dtype: torch.dtype, device: torch.device,
    ) -> None:  # fmt: skip
        self._dtype, self._uncoded = dtype, uncoded
        self._memory: dict[str, Tensor] = {}
        self.coded: list[Coded] = []
        size = 0
        for codec, section in sections:
            self.coded.append(Coded(codec, section, size, dtype, device))
            size = self.coded[-1].end
        self._rest_at = Place(size, 1, sum(stretch.length for stretch in uncoded), dtype)
        self.message = torch.zeros(p, self._rest_at.end, dtype=torch.uint8, device=device)
        for one in self.coded:
            one.settle(self.message)

    def wide(self, name: str, like: Tensor) -> Tensor:
        """``like`` itself, if it is of the dtype that the bucket is worked on in; else memory for it, under a name."""
        if like.dtype == self._dtype:
            return like
        if name not in self._memory:
            self._memory[name] = torch.empty_like(like, dtype=self._dtype)
        return self._memory[name]

    def fill(self, parts: Tensor, divisor: int) -> None:
        """Write the mean's share of what is not compressed, of each of ``parts`` (p, elements)."""
        for part, share in zip(parts, self.message, strict=True):
            for values, its in self._rest(part, share):
                torch.mul(values, 1.0 / divisor, out=its)

    def sum(self, received: Tensor, out: Tensor, divisor: int) -> None:
        """Leave in ``out`` (1-D) the mean of what all ranks sent, in their order."""
        shares = received.view(self.message.shape)
        for one in self.coded:
            one.sum(shares, out, divisor)
        for turn, share in enumerate(shares):
            for values, its in self._rest(out, share):
                if turn:
                    values.add_(its)
                else:
                    values.copy_(its)

    def _rest(self, part: Tensor, share: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        if self._uncoded:
            memory, start = self._rest_at.within(share)[0], 0
            for stretch in self._uncoded:
                yield part_of(part, stretch), memory.narrow(0, start, stretch.length)
                start += stretch.length
