"""One step under way."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import attrs
import torch

if TYPE_CHECKING:
    from torch import Tensor

    from commhub.drivers._task import Task
    from commhub.protocol._collectives import Subgroup


@attrs.define(eq=False, kw_only=True)
class Step:
    """What all buckets of a step have in common, and the buckets so far.

    Attributes:
        divisor, divides, loss_scale: as a ``Bucket`` has them.
        watch: whether its buckets note if they are finite, because the hook remembers something.
        tasks: one for each bucket, in order.
        asked: whether this rank has told its peers that the step ended well here, so that theirs may have ended.
    """

    divisor: int
    divides: bool
    loss_scale: float
    watch: bool
    tasks: list[Task] = attrs.Factory(list)
    asked: bool = False
    _thread: int = attrs.Factory(threading.get_ident)

    @property
    def is_left_over(self) -> bool:
        """Whether the backward that it is part of has ended without it, in a Ctrl-C for instance."""
        return self._thread == threading.get_ident() and torch._C._current_graph_task_id() == -1

    @property
    def met(self) -> set[Subgroup | None]:
        """The groups in which its ranks met, ``None`` among them if all did."""
        return {group for task in self.tasks for group in task.groups}

    @property
    def scatters(self) -> bool:
        """Whether each rank has a part of the results alone."""
        return any(task.bucket.shard is not None for task in self.tasks)

    @property
    def finite(self) -> Tensor | bool:
        """Whether all its results were finite, as far as that was watched."""
        return torch.stack([task.bucket.finite for task in self.tasks]).all() if self.tasks and self.watch else True
