"""The order in which one round's collectives are issued, and everything done meanwhile.

Tasks are numbered by arrival within a round, and stage j of task k is issued in the order of (k + 2j, k) on every
rank, whenever its turn comes and whatever else is ready: that order is all that keeps the ranks' collectives
matched. Everything else (a hook's encoding, resuming with a result) happens as soon as it can.
"""

from __future__ import annotations

import itertools
import time
from typing import TYPE_CHECKING

from . import _ranges
from ._failure import Stopped
from ._watch import SLICE

if TYPE_CHECKING:
    from ._communicator import Communicator, Flight
    from ._inbox import Inbox
    from ._task import Task
    from ._timeline import Recorder
    from ._watch import Watch

_SHORTEST, _LONGEST = 0.0002, 0.002
"""Seconds between looks at Gloo while more buckets may come: a tenth of the time waited so far, within these."""
STRIDE = 2
"""Buckets that enter between two stages of one bucket, and so how many messages are in flight at the least.

With 1, a hook of one stage would have a single message in flight: that there is no second is known when the first has
come back. (12 buckets of 2 MiB, two ranks on one host: 1.3 x the time of bare DDP with 1, 1.2 x with 2 and 3.)
"""


class Pipeline:
    """Carries out the tasks of one round after another; runs in the communication thread alone.

    Args:
        communicator: the groups to communicate on; another may take its place between rounds.
        inbox: where tasks come from.
        watch: guards hooks and looks around.
        recorder: keeps what happened when.
    """

    def __init__(self, communicator: Communicator, inbox: Inbox, watch: Watch, recorder: Recorder) -> None:
        self.communicator = communicator
        self.active: list[Task] = []
        self._inbox, self._watch, self._recorder = inbox, watch, recorder
        self._flights: dict[Task, list[Flight]] = {}

    def round(self) -> None:
        """Carry out a round.

        Raises:
            HookError: what went wrong, here or on a peer.
            Stopped: if the driver is being closed.
        """
        for turn in itertools.count():
            for task in [task for task in self.active if (turn - task.entered) % STRIDE == 0]:
                self._until_back(task)
                self._go_on(task)
            entering = self._next()
            if entering is None and not self.active:
                return
            if entering is not None:
                entering.entered = turn
                self.active.append(entering)
                self._inbox.arrived.popleft()
                self._go_on(entering)

    def forget(self) -> None:
        """Drop what was in flight, after it was ended."""
        self._flights.clear()
        self.active.clear()
        self._watch.progress.forget()

    def _go_on(self, task: Task) -> None:
        if not task.finished:
            self._watch.progress.comes_to(task)
        self._watch.compare(task, [*self._flights, task], self._check)
        if task.finished:
            self.active.remove(task)
            task.complete()
            return
        self._watch.guarded(task, lambda: self._issue(task))

    def _check(self) -> None:
        if self._inbox.closing:
            raise Stopped
        if self._watch.given_up is not None:
            raise self._watch.given_up

    def _next(self) -> Task | None:
        """The next bucket, encoded; None when the round has no more."""
        while True:
            ready, over = self._inbox.first()
            if ready is not None:
                self._start(ready)
                return ready
            if over:
                return None
            self._do_something()

    def _until_back(self, task: Task) -> None:
        while task in self._flights:
            self._do_something()

    def _do_something(self) -> None:
        """Resume what has arrived, else encode what waits, else sleep a little."""
        self._check()
        for task, flights in self._flights.items():
            if all(flight.is_done() for flight in flights):
                self._resume(task)
                return
        waiting = self._inbox.unstarted()
        if waiting is not None:
            self._start(waiting)
            return
        self._sleep()

    def _start(self, task: Task) -> None:
        if not task.started:
            self._recorder.works()
            self._watch.guarded(task, task.start)

    def _issue(self, task: Task) -> None:
        task.issued_at = time.monotonic()
        if task.record is not None:
            task.record.stages[-1].issued = task.issued_at
        flights = self._flights[task] = []
        for job in task.jobs:
            flights.append(self.communicator.launch(job))
        self._watch.progress.issued(task, flights)

    def _resume(self, task: Task) -> None:
        flights = self._flights.pop(task)
        self._recorder.works()
        self._watch.guarded(task, lambda: self._take(task, flights))

    def _take(self, task: Task, flights: list[Flight]) -> None:
        raws = [flight.result() for flight in flights]
        self._watch.progress.has(task)  # unless they have ended badly
        task.resume(raws)

    def _sleep(self) -> None:
        began = time.monotonic()
        oldest = next(iter(self._flights), None)
        if oldest is not None:
            self._watch.look(oldest, oldest.issued_at, list(self._flights))
        pending = ((f, task) for task, fs in self._flights.items() for f in fs if not f.is_done())
        first, task = next(pending, (None, None))
        if first is None or task is None:
            self._watch.look_seldom()
            self._inbox.await_more(SLICE)
            return
        with _ranges.of(task.record, "wait"):
            if not self._inbox.ended:
                with self._inbox.changed:
                    self._inbox.changed.wait(min(max(0.1 * (began - task.issued_at), _SHORTEST), _LONGEST))
            else:
                first.wait(SLICE)
        self._recorder.waited(began, time.monotonic())
