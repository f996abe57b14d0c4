"""Ranks that average other parts of the same model, each with a hook of its own: a step counts on all or on none.

They meet when a step has ended, and before and after parameters are averaged. Ranks may come to an average in different
places: some as the optimizer has stepped, one whose step was skipped in its next forward, which takes all of them.
"""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from commhub._errors import HookError, described
from commhub.training._target import LONGEST
from commhub.training.rendezvous._everywhere import LATER

if TYPE_CHECKING:
    from torch import Tensor

    from commhub.training._target import Target

_GONE = "the ranks that keep this replica's other shards cannot be reached any more"
_SHOWN = 1000
"""How many bytes of an error the others are told."""


class Elsewhere:
    """The end of one step or average, told among them once. On a device that the host does not wait for nothing is.

    Args:
        target: whose ``others`` they are; it may have none.

    Attributes:
        was_told: whether this rank has had its say.
        is_lost: whether they could not be reached; then nobody is waited for again.
    """

    def __init__(self, target: Target) -> None:
        self._group = target.others if target.device.type == "cpu" else None
        self._patience = timedelta(seconds=min(LATER * target.timeout, LONGEST))
        self.was_told = self.is_lost = False

    def told(self, failure: BaseException | None, finite: Tensor | bool = True) -> tuple[str, Tensor | bool]:
        """Tell them how the step went here, and hear how it went elsewhere.

        Args:
            failure: of this rank's own part.
            finite: whether all that was averaged here is finite, as far as that was watched.

        Returns:
            What went wrong elsewhere, empty if nothing did; whether everything is finite, here too.
        """
        self.was_told = True
        if self._group is None or self.is_lost:
            return "", finite
        try:
            failed, infinite = self._counted(failure is not None, not finite)
            if not failed:
                return "", not infinite
            texts = self._gathered("" if failure is None else described(failure))
        except RuntimeError as error:
            self.is_lost = True
            return f"{_GONE}: {described(error)}", finite
        rank, text = next((rank, text) for rank, text in enumerate(texts) if text)
        return f"the step failed where shard {rank} is averaged: {text}", finite

    def meet(self, *, begins: bool, holds: bool) -> tuple[bool, bool]:
        """Meet where an average is due; on all ranks.

        Args:
            begins: whether this rank is going to average whatever it hears.
            holds: whether it can.

        Returns:
            Whether any of them is going to; whether all of them can.

        Raises:
            HookError: if they cannot be reached.
        """
        if self._group is None or self.is_lost:
            return begins, holds
        try:
            beginning, lacking = self._counted(begins, not holds)
        except RuntimeError as error:
            self.is_lost = True
            raise HookError(f"{_GONE}: {described(error)}") from error
        return bool(beginning), not lacking

    def _counted(self, *flags: bool) -> list[float]:
        counts = torch.tensor(flags, dtype=torch.float32)
        dist.all_reduce(counts, group=self._group, async_op=True).wait(self._patience)
        found: list[float] = counts.tolist()
        return found

    def _gathered(self, text: str) -> list[str]:
        mine = torch.zeros(_SHOWN, dtype=torch.uint8)
        content = text.encode()[:_SHOWN]
        mine[: len(content)] = torch.tensor(list(content), dtype=torch.uint8)
        every = [torch.empty_like(mine) for _ in range(dist.get_world_size(self._group))]
        dist.all_gather(every, mine, group=self._group, async_op=True).wait(self._patience)
        return [bytes(one.tolist()).rstrip(b"\0").decode(errors="replace") for one in every]
