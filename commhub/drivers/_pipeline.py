"""The order in which one round's collectives are issued, and everything done meanwhile.

Lanes are numbered by arrival within a round, and stage j of lane k is issued in the order of (k + 2j, k) on every
rank, whenever its turn comes and whatever else is ready: that order is all that keeps the ranks' collectives
matched. Everything else (a hook's encoding, landing a result) happens as soon as it can.
"""

from __future__ import annotations

import itertools
import time
from typing import TYPE_CHECKING

from ._failure import Stopped
from ._watch import SLICE

if TYPE_CHECKING:
    from ._communicator import Communicator, Flight
    from ._inbox import Inbox
    from ._lane import Lane
    from ._network import Network
    from ._stats import Meter
    from ._watch import Watch

_SHORTEST, _LONGEST = 0.0002, 0.002
"""Seconds between looks at Gloo while more buckets may come: a tenth of the time waited so far, within these."""
_STRIDE = 2
"""Buckets that enter between two stages of one bucket, and so how many messages are in flight at the least.

With 1, a hook of one stage would have a single message in flight: that there is no second is known when the first has
landed. (12 buckets of 2 MiB, two ranks on one host: 1.3 x the time of bare DDP with 1, 1.2 x with 2 and 3.)
"""


class Pipeline:
    """Carries out the lanes of one round after another; runs in the communication thread alone.

    Args:
        communicator: the groups to communicate on.
        inbox: where lanes come from.
        watch: guards hooks and looks around.
        meter: counts the figures.
    """

    def __init__(self, communicator: Communicator, inbox: Inbox, watch: Watch, meter: Meter) -> None:
        self.network: Network | None = None
        self.active: list[Lane] = []
        self._communicator, self._inbox, self._watch, self._meter = communicator, inbox, watch, meter
        self._flights: dict[Lane, list[Flight]] = {}
        self._link_free = 0.0

    def round(self) -> None:
        """Carry out a round.

        Raises:
            HookError: what went wrong, here or on a peer.
            Stopped: if the driver is being closed.
        """
        for turn in itertools.count():
            for lane in [lane for lane in self.active if (turn - lane.entered) % _STRIDE == 0]:
                self._until_landed(lane)
                self._go_on(lane)
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

    def _go_on(self, lane: Lane) -> None:
        self._watch.compare(lane, [*self._flights, lane], self._check)
        if lane.finished:
            self.active.remove(lane)
            lane.settle()
            return
        self._watch.guarded(lane, lambda: self._issue(lane))

    def _check(self) -> None:
        if self._inbox.closing:
            raise Stopped
        if self._watch.given_up is not None:
            raise self._watch.given_up

    def _next(self) -> Lane | None:
        """The next bucket, encoded; None when the round has no more."""
        while True:
            ready, over = self._inbox.first()
            if ready is not None:
                self._start(ready)
                return ready
            if over:
                return None
            self._do_something()

    def _until_landed(self, lane: Lane) -> None:
        while lane in self._flights:
            self._do_something()

    def _do_something(self) -> None:
        """Land what has arrived, else encode what waits, else sleep a little."""
        self._check()
        for lane, flights in self._flights.items():
            if all(self._is_over(flight) for flight in flights):
                self._land(lane)
                return
        waiting = self._inbox.unstarted()
        if waiting is not None:
            self._start(waiting)
            return
        self._sleep()

    def _start(self, lane: Lane) -> None:
        if not lane.started:
            self._watch.guarded(lane, lane.start)

    def _issue(self, lane: Lane) -> None:
        now = time.monotonic()
        flights = self._flights[lane] = []
        for job in lane.jobs:
            flight = self._communicator.launch(job)
            if self.network is not None and job.p > 1:
                self._link_free = max(now, self._link_free) + self.network.occupied(job.sent_bytes)
                flight.not_before = self._link_free + self.network.latency
            self._meter.step.sent_bytes += job.sent_bytes
            flights.append(flight)
        lane.issued_at = now

    def _land(self, lane: Lane) -> None:
        flights = self._flights.pop(lane)
        self._watch.guarded(lane, lambda: lane.land([flight.result() for flight in flights]))

    def _is_over(self, flight: Flight) -> bool:
        return flight.is_done() and time.monotonic() >= flight.not_before

    def _sleep(self) -> None:
        began = time.monotonic()
        oldest = next(iter(self._flights), None)
        if oldest is not None:
            self._watch.look(oldest, oldest.issued_at, list(self._flights))
        pending = ((f, lane.issued_at) for lane, fs in self._flights.items() for f in fs if not self._is_over(f))
        first, issued = next(pending, (None, 0.0))
        if first is None:
            self._inbox.await_more(SLICE)
            return
        if not self._inbox.ended:
            with self._inbox.changed:
                self._inbox.changed.wait(min(max(0.1 * (began - issued), _SHORTEST), _LONGEST))
        elif not first.is_done():
            first.wait(SLICE)
        else:
            time.sleep(min(max(first.not_before - began, 0.0), SLICE))
        self._meter.spent("wait", began, time.monotonic())
