"""The lanes of one round on their way from the training thread to the communication thread."""

from __future__ import annotations

import threading
from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ._lane import Lane


class Inbox:
    """Lanes in order of arrival.

    Attributes:
        changed: held to look at or change anything here; notified when something has changed.
        arrived: what the communication thread has not taken yet.
        ended: whether no more lanes come before the round is over.
        closing: whether the driver is being closed.
        idle: whether the round is over: every lane is settled.
    """

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.arrived: deque[Lane] = deque()
        self.ended = self.closing = False
        self.idle = True

    def put(self, lane: Lane) -> None:
        """Add the round's next lane."""
        with self.changed:
            self.idle = self.ended = False
            self.arrived.append(lane)
            self.changed.notify_all()

    def end(self) -> None:
        """Say that no more lanes come."""
        with self.changed:
            self.ended = True
            self.changed.notify_all()

    def rest(self) -> None:
        """Say that the round is over."""
        with self.changed:
            self.idle = True
            self.changed.notify_all()

    def first(self) -> tuple[Lane | None, bool]:
        """The lane that has waited longest, and whether there is none and will be none."""
        with self.changed:
            ready = self.arrived[0] if self.arrived else None
            return ready, self.ended and ready is None

    def unstarted(self) -> Lane | None:
        """The first lane that has not begun."""
        with self.changed:
            return next((lane for lane in self.arrived if not lane.started), None)

    def await_more(self, seconds: float) -> None:
        """Return when something comes, or after so many seconds."""
        with self.changed:
            if not self.arrived and not self.ended and not self.closing:
                self.changed.wait(seconds)
