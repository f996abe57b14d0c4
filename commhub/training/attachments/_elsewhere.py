"""Ranks that average other parts of the same model, each with a hook of its own: a step counts on all or on none."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from commhub._errors import described
from commhub.training._target import LONGEST
from commhub.training.rendezvous._everywhere import LATER

if TYPE_CHECKING:
    from torch import Tensor

    from commhub.training._target import Target

_SHOWN = 1000
"""How many bytes of an error the others are told."""


class Elsewhere:
    """The end of one step, told among them once. On a device that the host does not wait for, nothing is told.

    Args:
        target: whose ``others`` they are; it may have none.

    Attributes:
        was_told: whether this rank has had its say.
    """

    def __init__(self, target: Target) -> None:
        self._group = target.others if target.device.type == "cpu" else None
        self._patience = timedelta(seconds=min(LATER * target.timeout, LONGEST))
        self.was_told = False

    def told(self, failure: BaseException | None, finite: Tensor | bool = True) -> tuple[str, Tensor | bool]:
        """Tell them how the step went here, and hear how it went elsewhere.

        Args:
            failure: of this rank's own part.
            finite: whether all that was averaged here is finite, as far as that was watched.

        Returns:
            What went wrong elsewhere, empty if nothing did; whether everything is finite, here too.
        """
        self.was_told = True
        if self._group is None:
            return "", finite
        try:
            counts = torch.tensor([float(failure is not None), float(not finite)])
            dist.all_reduce(counts, group=self._group, async_op=True).wait(self._patience)
            failed, infinite = counts.tolist()
            if not failed:
                return "", not infinite
            texts = self._gathered("" if failure is None else described(failure))
        except RuntimeError as error:
            said = f"the ranks that keep this replica's other shards cannot be reached any more: {described(error)}"
            return said, finite
        rank, text = next((rank, text) for rank, text in enumerate(texts) if text)
        return f"the step failed where shard {rank} is averaged: {text}", finite

    def _gathered(self, text: str) -> list[str]:
        mine = torch.zeros(_SHOWN, dtype=torch.uint8)
        content = text.encode()[:_SHOWN]
        mine[: len(content)] = torch.tensor(list(content), dtype=torch.uint8)
        every = [torch.empty_like(mine) for _ in range(dist.get_world_size(self._group))]
        dist.all_gather(every, mine, group=self._group, async_op=True).wait(self._patience)
        return [bytes(one.tolist()).rstrip(b"\0").decode(errors="replace") for one in every]
