"""Cut the text into training batches and held-out windows, alike for every hook, disjoint between ranks."""

from __future__ import annotations

import attrs
import torch
from torch import Tensor

from ._text import HELD_OUT, required_bytes


@attrs.frozen(kw_only=True)
class Text:
    """Byte windows of ``context + 1``: the first ``context`` bytes are read, the last ``context`` predicted.

    The first 95 % of the text is trained on, the rest is held out. Windows of training text are dealt in an
    order that depends on the seed alone, so that step k sees the same global batch under every hook.
    """

    train: Tensor
    held_out: Tensor
    context: int

    @classmethod
    def cut(cls, text: bytes, *, context: int) -> Text:
        """Split ``text`` into training and held-out windows (uint8, shape (windows, context + 1))."""
        data = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        border = int(len(data) * (1 - HELD_OUT))
        return cls(train=_windows(data[:border], context), held_out=_windows(data[border:], context), context=context)

    def batch(self, step: int, *, rank: int, world_size: int, size: int, seed: int) -> Tensor:
        """Return a rank's batch at ``step``: int64, shape (size, context + 1). Each epoch is shuffled afresh.

        Raises:
            ValueError: if the text has fewer windows than one global batch.
        """
        per_epoch = len(self.train) // (world_size * size)
        if per_epoch == 0:
            needed = required_bytes(context=self.context, batch=size, world_size=world_size)
            raise ValueError(f"the text is too short: one step of {world_size} ranks needs {needed:,} bytes")
        epoch, position = divmod(step, per_epoch)
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        order = torch.randperm(len(self.train), generator=generator)
        start = (position * world_size + rank) * size
        return self.train[order[start : start + size]].long()

    def validation(self, *, rank: int, world_size: int, windows: int) -> Tensor:
        """Return a rank's share of at most ``windows`` held-out windows spread evenly over the held-out text.

        Over all ranks the same windows are used whatever the number of ranks; a rank's share may be empty.
        """
        count = min(windows, len(self.held_out))
        chosen = torch.linspace(0, len(self.held_out) - 1, count).round().long()
        return self.held_out[chosen[rank::world_size]].long()


def _windows(data: Tensor, context: int) -> Tensor:
    """Windows of ``context + 1`` bytes: neighbours share one byte, a target in one and an input in the next."""
    return data.unfold(0, context + 1, context) if len(data) > context else data.new_empty((0, context + 1))
