"""What an engine asks of a driver."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from torch import Tensor

    from commhub._errors import HookError
    from commhub.protocol._collectives import Subgroup

    from ._network import Network
    from ._stats import Meter
    from ._task import Task


class Driver(Protocol):
    """What carries tasks out; see README.md in this folder."""

    meter: Meter
    failure: HookError | None
    network: Network | None
    confirms: bool
    """Whether a round can end on this rank before it is known to have ended well on the others."""

    def connect(self, groups: Sequence[Sequence[int]]) -> Sequence[Subgroup]:
        """Communicators among disjoint groups of ranks."""

    def submit(self, task: Task) -> None:
        """Take the round's next bucket."""

    def end_round(self) -> None:
        """No more buckets come until ``wait`` has returned."""

    def wait(self) -> None:
        """Return when every task is complete."""

    def future(self) -> torch.futures.Future[Tensor]:
        """A future for a bucket, to be completed from ``Task``'s ``done``."""

    def in_use(self) -> str:
        """Why memory of its buckets may still be written to, for people; empty if it is not."""

    def close(self) -> None:
        """Give up threads and groups."""
