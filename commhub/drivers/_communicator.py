"""What the thread driver communicates on. A protocol, so that what shapes or breaks a link can stand in between."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from commhub.protocol._collectives import Subgroup

    from ._job import Job


class Flight(Protocol):
    """One collective on its way."""

    def is_done(self) -> bool:
        """Whether it has ended, well or badly."""

    def wait(self, seconds: float) -> None:
        """Block until it makes progress, at most this long. Raises nothing."""

    def result(self) -> Tensor:
        """What came of it, 1-D, as it travelled.

        Raises:
            RuntimeError: where it ended badly.
        """


class Communicator(Protocol):
    """The group of all ranks of a registration, and the subgroups that its hook asked for."""

    rank: int
    size: int

    def connect(self, groups: Sequence[Sequence[int]]) -> Sequence[Subgroup]:
        """Communicators among each of the groups; every rank calls this with the same ones, in the same order."""

    def launch(self, job: Job) -> Flight:
        """Start a collective; nothing blocks.

        Raises:
            HookError: for a kind that it cannot carry out.
        """

    def abort(self, seconds: float) -> bool:
        """End all that is in flight in any of the groups, badly; nothing can be launched any more.

        Returns:
            Whether it has ended within so many seconds. Only then nothing writes into its memory any more. The
            peers' own collectives fail of it, but end for certain only when they abort too.
        """

    def close(self) -> None:
        """Give the groups up. Nothing blocks."""
