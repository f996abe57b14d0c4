"""What the communication thread looks out for: its own hook, its peers' failures and questions, and the time."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from commhub._errors import HookError, HookTimeoutError, described

from ._failure import is_lost_connection, own_error, peer_error

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ._board import FailureBoard
    from ._signature import Signatures
    from ._task import Task

SLICE = 0.5
"""Seconds of an uninterrupted wait, and between looks at the board."""
_SOON = 0.1
"""Seconds that a task has waited before anything is looked at on its behalf."""


class Heard(Exception):  # noqa: N818 - it carries the error, which is another rank's
    """A peer has failed."""

    def __init__(self, failure: HookError) -> None:
        super().__init__(str(failure))
        self.failure = failure


class Watch:
    """Guards every piece of a task, and ends waits that lead nowhere.

    ``given_up`` is set by a thread that waits no longer: the piece under way then leads to nothing.

    Args:
        board: where ranks report failures.
        signatures: answers peers that ask whether this rank asks for what they do.
        timeout: seconds after which a collective, or a hook that does not return, has failed.
        label: the hook's name, distribution and version, for errors.
    """

    def __init__(self, board: FailureBoard, signatures: Signatures, timeout: float, label: str) -> None:
        self.board, self.signatures = board, signatures
        self.timeout, self.label = timeout, label
        self.given_up: HookError | None = None
        self._looked = 0.0
        self._busy: tuple[Task, float] | None = None

    def guarded(self, task: Task, step: Callable[[], None]) -> None:
        """Run a piece of a task; whatever it raises becomes the failure that every rank will hear of."""
        try:
            self._busy = task, time.monotonic()
            try:
                step()
            finally:
                self._busy = None  # what follows is not the hook's time
        except Heard as heard:
            raise heard.failure from heard.failure.__cause__
        except BaseException as error:
            if self.given_up is not None:
                raise self.given_up from error
            peer = self.board.read_soon(2.0) if is_lost_connection(error) else None
            if peer is not None:
                raise peer_error(self.label, task.bucket, *peer, cause=error) from error
            failure = own_error(self.label, task.bucket, error)
            self.board.post(str(failure).partition(": ")[2])
            raise failure from error
        if self.given_up is not None:
            raise self.given_up

    def overdue(self, now: float) -> HookError | None:
        """An error if a piece of a task has taken longer than the timeout. Any thread may ask."""
        busy = self._busy
        if busy is None or now - busy[1] <= self.timeout:
            return None
        task, since = busy
        told = (
            f"the hook has not returned for {now - since:.1f} s, and Python cannot end it. This registration is of no "
            "use until it returns; then swap or register."
        )
        return own_error(self.label, task.bucket, HookTimeoutError(told))

    def look(self, task: Task, since: float, waiting: Sequence[Task]) -> None:
        """Look around, seldom, on behalf of a task that has waited since then.

        Args:
            task: which has waited longest.
            since: monotonic seconds.
            waiting: all tasks whose collectives are awaited or held back.

        Raises:
            HookError: if a peer has failed, the time is up, or ranks ask for different things.
        """
        now = time.monotonic()
        if now - since <= self.timeout and (now - since <= _SOON or now - self._looked <= SLICE):
            return
        self._looked = now
        if (peer := self.board.read()) is not None:
            raise peer_error(self.label, task.bucket, *peer)
        self.guarded(task, lambda: self._answer(task, now - since, waiting))

    def _answer(self, task: Task, waited: float, waiting: Sequence[Task]) -> None:
        self.signatures.answer(waiting)
        if waited > self.timeout:
            kinds = ", ".join(job.kind.__name__ for job in task.jobs) or "a peer's answer"
            raise HookTimeoutError(f"{kinds} did not end within {self.timeout:g} s; a peer is gone, late or stuck.")

    def compare(self, task: Task, waiting: Sequence[Task], check: Callable[[], None]) -> None:
        """Wait until the peers ask for the same as a task does, where that is new.

        Args:
            task: which asks.
            waiting: all tasks whose collectives are awaited, this one included.
            check: raises where nobody wants to wait any more.

        Raises:
            HookError: as ``look``.
        """
        comparison = self.signatures.note(task)
        if comparison is None:
            return
        began = time.monotonic()
        try:
            while not comparison.is_over():
                check()
                self.look(task, began, waiting)
        except HookError:
            raise
        except RuntimeError as error:
            told = HookError(
                f"what the ranks ask for cannot be compared, because their store fails: {described(error)}"
            )
            failure = own_error(self.label, task.bucket, told)
            raise failure from error
