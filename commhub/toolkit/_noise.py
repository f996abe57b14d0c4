"""Random numbers for stochastic rounding: each parameter's own, whatever the bucket, never from a global generator."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Iterable

    from commhub.protocol._bucket import Bucket

    from ._layout import Lines


class Noise:
    """Uniform numbers in [0, 1) that depend on a seed, a parameter's name, the step, and what they are for."""

    def __init__(self, device: torch.device) -> None:
        self._generator = torch.Generator(device)

    def draw(
        self, out: Tensor, lines: Iterable[Lines], bucket: Bucket, seed: int, purpose: object, *, packed: bool
    ) -> Tensor:
        """Fill the rows of ``out`` (rows, row) that ``lines`` name; ``packed``: the rows in the order of the lines.

        ``purpose`` keeps apart what is rounded at one time: the ranks' own values, and their shares of the mean.
        """
        start = 0
        for line in lines:
            what = (seed, bucket.names[line.place], bucket.step, purpose)
            digest = hashlib.blake2b(repr(what).encode(), digest_size=8).digest()
            self._generator.manual_seed(int.from_bytes(digest, "little") >> 1)
            rows = range(start, start + len(line.rows)) if packed else line.rows
            start += len(line.rows)
            straight = rows[-1] - rows[0] == len(rows) - 1
            for run in [rows] if straight else [rows[:-1], rows[-1:]]:
                out[run[0] : run[-1] + 1].uniform_(generator=self._generator)
        return out
