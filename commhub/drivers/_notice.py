"""What is said of a wait that takes long, well before its timeout: that it waits, and for whom."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

from ._progress import Doing
from ._store import Errand

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ._board import FailureBoard, Roll
    from ._task import Task

SILENT = 10.0
"""Seconds of waiting after which it is said who is waited for."""
_ROLL_CALL = 2.0
"""Seconds in which the peers answer what they do."""

logger = logging.getLogger("commhub")


class Notice:
    """Says once of each long wait whom it waits for: the first that exceeds ``SILENT``, and then those twice as long.

    Args:
        board: where the peers are called.
        size: ranks of the registration's group.
        timeout: seconds after which a wait is an error.
        label: the hook's name, distribution and version.
    """

    def __init__(self, board: FailureBoard, size: int, timeout: float, label: str) -> None:
        self._board, self._size, self._timeout, self._label = board, size, timeout, label
        self._longest = 0.0
        self._said: float | None = None
        self._called: tuple[float, Errand[Roll]] | None = None

    def look(self, task: Task, since: float, members: Sequence[int], who: Callable[[Roll, Sequence[int]], str]) -> None:
        """Call the peers where a task has waited for long, and log what they answer; blocks nobody.

        Args:
            task: which waits.
            since: monotonic seconds.
            members: the ranks that it needs.
            who: what is said of a roll, a sentence without its end.
        """
        waited = time.monotonic() - since
        if self._called is None:
            if since != self._said and max(SILENT, 2 * self._longest) < waited < self._timeout:
                self._called = since, Errand(lambda: self._board.roll_call(_ROLL_CALL))
            return
        began, errand = self._called
        if not errand.wait(0.0):
            return
        self._called = None
        if began != since:
            return  # what it was for is over
        self._said, self._longest = since, waited
        roll = errand.result()
        if roll.found is None:
            self._tell(task, waited, _missing(roll, members), who(roll, members))

    def _tell(self, task: Task, waited: float, missing: Sequence[int], told: str) -> None:
        names = f"rank{'s' if len(missing) > 1 else ''} {', '.join(map(str, missing))}" if missing else "its peers"
        logger.warning(
            "%s, bucket %d, step %d, rank %d waits for %s of 0..%d (%.1f s so far, until %g s); %s.",
            self._label,
            task.bucket.index,
            task.bucket.step,
            task.bucket.rank,
            names,
            self._size - 1,
            waited,
            self._timeout,
            told,
        )


def _missing(roll: Roll, members: Sequence[int]) -> list[int]:
    """The members that have not come."""
    late = {rank for rank, answer in roll.doing.items() if not Doing.read(answer).waits}
    return sorted((late | set(roll.left) | set(roll.silent)) & set(members))
