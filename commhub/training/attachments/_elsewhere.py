"""Ranks that average other parts of the same model, each with a hook of its own: a step counts on all or on none."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from commhub._errors import described
from commhub.training._target import LONGEST
from commhub.training.rendezvous._everywhere import LATER


class Elsewhere:
    """The end of a step, told among them.

    Args:
        group: they, this rank among them.
        device: of the gradients. On one whose work the host does not wait for, nothing is told.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device, timeout: float) -> None:
        self._group, self._device = group, device
        self._patience = timedelta(seconds=min(LATER * timeout, LONGEST))

    def told(self, failure: BaseException | None, finite: bool = True) -> tuple[str, bool]:
        """Tell them how the step went here, and hear how it went elsewhere.

        Args:
            failure: of this rank's own part.
            finite: whether all that was averaged here is finite, as far as that was watched.

        Returns:
            What went wrong elsewhere, empty if nothing did; whether everything is finite, here too.
        """
        if self._device.type != "cpu" or self._group.size() == 1:
            return "", finite
        try:
            counts = torch.tensor([float(failure is not None), float(not finite)])
            self._wait(dist.all_reduce(counts, group=self._group, async_op=True))
            failed, unfinished = counts.tolist()
            if not failed:
                return "", not unfinished
            texts: list[str | None] = [None] * self._group.size()
            dist.all_gather_object(texts, "" if failure is None else described(failure), group=self._group)
        except RuntimeError as error:
            said = f"the ranks that keep this replica's other shards cannot be reached any more: {described(error)}"
            return said, finite
        rank, text = next((rank, text) for rank, text in enumerate(texts) if text)
        return f"the step failed where shard {rank} is averaged: {text}", finite

    def _wait(self, work: Any) -> None:
        work.wait(self._patience)
