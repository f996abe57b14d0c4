"""The tasks of one round on their way from the training thread to the communication thread."""

from __future__ import annotations

import threading
from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ._task import Task


class Inbox:
    """Tasks in order of arrival.

    Attributes:
        changed: held to look at or change anything here; notified when something has changed.
        arrived: what the communication thread has not taken yet.
        ended: whether no more tasks come before the round is over.
        closing: whether the driver is being closed.
        idle: whether the round is over: every task is complete.
    """

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.arrived: deque[Task] = deque()
        self.ended = self.closing = False
        self.idle = True

    def put(self, task: Task) -> None:
        """Add the round's next task."""
        with self.changed:
            self.idle = self.ended = False
            self.arrived.append(task)
            self.changed.notify_all()

    def end(self) -> None:
        """Say that no more tasks come."""
        with self.changed:
            self.ended = True
            self.changed.notify_all()

    def rest(self) -> None:
        """Say that the round is over."""
        with self.changed:
            self.idle = True
            self.changed.notify_all()

    def first(self) -> tuple[Task | None, bool]:
        """The task that has waited longest, and whether there is none and will be none."""
        with self.changed:
            ready = self.arrived[0] if self.arrived else None
            return ready, self.ended and ready is None

    def unstarted(self) -> Task | None:
        """The first task that has not begun."""
        with self.changed:
            return next((task for task in self.arrived if not task.started), None)

    def await_more(self, seconds: float) -> None:
        """Return when something comes, or after so many seconds."""
        with self.changed:
            if not self.arrived and not self.ended and not self.closing:
                self.changed.wait(seconds)
