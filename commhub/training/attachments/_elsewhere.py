"""Ranks that average other parts of the same model, each with a hook of its own: a step counts on all or on none."""

from __future__ import annotations

import torch
import torch.distributed as dist

from commhub._errors import described


class Elsewhere:
    """The end of a step, told among them.

    Args:
        group: they, this rank among them.
        device: of the gradients. On one whose work the host does not wait for, nothing is told.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        self._group, self._device = group, device

    def told(self, failure: BaseException | None) -> str:
        """Tell them whether the step went well here; what went wrong with it elsewhere, empty if nothing did.

        Args:
            failure: of this rank's own part.
        """
        if self._device.type != "cpu" or self._group.size() == 1:
            return ""
        try:
            failed = torch.tensor([float(failure is not None)])
            dist.all_reduce(failed, group=self._group)
            if not failed.item():
                return ""
            texts: list[str | None] = [None] * self._group.size()
            dist.all_gather_object(texts, "" if failure is None else described(failure), group=self._group)
        except RuntimeError as error:
            return f"the ranks that keep this replica's other shards cannot be reached any more: {described(error)}"
        rank, text = next((rank, text) for rank, text in enumerate(texts) if text)
        return f"the step failed where shard {rank} is averaged: {text}"
