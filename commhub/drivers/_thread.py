"""The driver for tensors in host memory: one communication thread and a Gloo group of its own per registration.

Buckets are numbered by arrival within a round, and stage j of bucket k is issued in the order of (k + 2j, k) on every
rank, whenever its turn comes and whatever else is ready: that order is all that keeps the ranks' collectives
matched. Everything else (a hook's encoding, landing a result) happens as soon as it can. Nothing runs in Gloo's
threads: the communication thread waits for Gloo in short slices, in which it also reads the peers' board.
See README.md in this folder.
"""

from __future__ import annotations

import atexit
import itertools
import os
import threading
import time
import weakref
from collections import deque
from typing import TYPE_CHECKING

import torch

from .._errors import HookError, HookTimeoutError
from ._failure import Stopped, is_lost_connection, own_error, peer_error
from ._gloo import Channel, Flight, sweep

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from .._collectives import Subgroup
    from .._network import Network
    from ._board import Board
    from ._lane import Lane
    from ._stats import Meter

_SHORTEST, _LONGEST = 0.0002, 0.002
"""Seconds between looks at Gloo while more buckets may come: a tenth of the time waited so far, within these."""
_STRIDE = 2
"""Buckets that enter between two stages of one bucket, and so how many messages are in flight at the least.

With 1, a hook of one stage would have a single message in flight: that there is no second is known when the first has
landed. (12 buckets of 2 MiB, two ranks on one host: 1.3 x the time of bare DDP with 1, 1.2 x with 2 and 3.)
"""
_SLICE = 0.5
"""Seconds of an uninterrupted wait, and between looks at the board."""
_drivers: weakref.WeakSet[ThreadDriver] = weakref.WeakSet()


class ThreadDriver:
    """Drives lanes in rounds: ``submit`` each bucket, ``end_round`` after the last, ``wait`` until all are settled.

    Args:
        channel: the group to communicate on.
        board: where ranks report failures.
        meter: counts the figures.
        timeout: seconds after which a collective has failed.
        label: the hook's name, distribution and version, for errors.
    """

    confirms = True

    def __init__(self, channel: Channel, board: Board, meter: Meter, *, timeout: float, label: str) -> None:
        self.channel, self.meter = channel, meter
        self.label = label
        self.network: Network | None = None
        self.failure: HookError | None = None
        self._board, self._timeout = board, timeout
        self._changed = threading.Condition()
        self._arrived: deque[Lane] = deque()
        self._ended = self._closing = False
        self._idle = True
        self._active: list[Lane] = []
        self._flights: dict[Lane, list[Flight]] = {}
        self._link_free = self._looked = 0.0
        self._thread: threading.Thread | None = None
        self._pid = os.getpid()
        _drivers.add(self)

    # Called by the training thread.

    def connect(self, groups: Sequence[Sequence[int]]) -> Sequence[Subgroup]:
        """Communicators among disjoint groups of ranks."""
        return self.channel.connect(groups)

    def future(self) -> torch.futures.Future[torch.Tensor]:
        """A future for one bucket."""
        return torch.futures.Future()

    def submit(self, lane: Lane) -> None:
        """Take the round's next bucket. Its exchange goes on in the background."""
        if self._closing:
            self.failure = HookError(f"{self.label}: this registration was closed. Register again.")
        if self.failure is not None:
            lane.abandon()
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._serve, name="commhub", daemon=True)
            self._thread.start()
        with self._changed:
            self._idle = self._ended = False
            self._arrived.append(lane)
            self._changed.notify_all()

    def end_round(self) -> None:
        """Say that no more buckets come until ``wait`` has returned."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def wait(self) -> None:
        """End the round and block until every lane is settled. Failures are in ``failure``."""
        self.meter.blocked_since = time.monotonic()
        with self._changed:
            self._ended = True
            self._changed.notify_all()
            while not self._idle:
                self._changed.wait(_SLICE)
                if self._thread is not None and not self._thread.is_alive():
                    raise HookError(f"{self.label}: the communication thread has ended. Register again.")
        self.meter.blocked_since = None

    def close(self) -> None:
        """Stop the thread and free the group; a step under way is given up. Does nothing in a forked child."""
        if os.getpid() != self._pid:
            return
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(timeout=10.0)
        self._thread = None
        self.channel.close()

    # The communication thread.

    def _serve(self) -> None:
        while True:
            with self._changed:
                while not self._arrived and not self._closing:
                    if self._ended:
                        self._idle = True
                        self._changed.notify_all()
                    self._changed.wait()
                if self._closing or self.failure is not None:
                    self._give_up()
                    if self._closing:
                        return
                    continue
            try:
                self._round()
            except Stopped:
                with self._changed:
                    self._give_up()
                return
            except HookError as failure:
                self.failure = failure
                self._flights.clear()
                with self._changed:
                    self._give_up()
            with self._changed:
                self._idle = True
                self._changed.notify_all()

    def _give_up(self) -> None:
        for lane in (*self._active, *self._arrived):
            lane.abandon()
        self._active.clear()
        self._arrived.clear()
        self._idle = True
        self._changed.notify_all()

    def _round(self) -> None:
        for turn in itertools.count():
            for lane in [lane for lane in self._active if (turn - lane.entered) % _STRIDE == 0]:
                self._until_landed(lane)
                if lane.finished:
                    self._active.remove(lane)
                    lane.settle()
                else:
                    self._issue(lane)
            entering = self._next()
            if entering is None and not self._active:
                return
            if entering is not None and not entering.finished:
                entering.entered = turn
                self._issue(entering)
                self._active.append(entering)
            elif entering is not None:
                entering.settle()

    def _next(self) -> Lane | None:
        """The next bucket, encoded; None when the round has no more."""
        while True:
            with self._changed:
                ready = self._arrived[0] if self._arrived else None
                ended = self._ended and ready is None
            if ready is not None:
                self._start(ready)
                self._arrived.popleft()
                return ready
            if ended:
                return None
            self._do_something()

    def _until_landed(self, lane: Lane) -> None:
        while lane in self._flights:
            self._do_something()

    def _do_something(self) -> None:
        """Land what has arrived, else encode what waits, else sleep a little."""
        if self._closing:
            raise Stopped
        for lane, flights in self._flights.items():
            if all(self._is_over(flight) for flight in flights):
                self._land(lane)
                return
        with self._changed:
            waiting = next((lane for lane in self._arrived if not lane.started), None)
        if waiting is not None:
            self._start(waiting)
            return
        self._sleep()

    def _start(self, lane: Lane) -> None:
        if not lane.started:
            self._guarded(lane, lane.start)

    def _issue(self, lane: Lane) -> None:
        now = time.monotonic()
        flights = []
        for job in lane.jobs:
            flight = self.channel.launch(job)
            if self.network is not None and job.p > 1:
                self._link_free = max(now, self._link_free) + self.network.occupied(job.sent_bytes)
                flight.not_before = self._link_free + self.network.latency
            self.meter.step.sent_bytes += job.sent_bytes
            flights.append(flight)
        self._flights[lane] = flights
        lane.issued_at = now

    def _land(self, lane: Lane) -> None:
        flights = self._flights.pop(lane)
        self._guarded(lane, lambda: lane.land([flight.result() for flight in flights]))

    def _is_over(self, flight: Flight) -> bool:
        return flight.is_done() and time.monotonic() >= flight.not_before

    def _sleep(self) -> None:
        began = time.monotonic()
        if began - self._looked > _SLICE:
            self._looked = began
            self._look_around(began)
        pending = ((f, lane.issued_at) for lane, fs in self._flights.items() for f in fs if not self._is_over(f))
        first, issued = next(pending, (None, 0.0))
        if first is None:
            with self._changed:
                if not self._arrived and not self._ended and not self._closing:
                    self._changed.wait(_SLICE)
            return
        if not self._ended:
            with self._changed:
                self._changed.wait(min(max(0.1 * (began - issued), _SHORTEST), _LONGEST))
        elif not first.is_done():
            first.wait(_SLICE)
        else:
            time.sleep(min(max(first.not_before - began, 0.0), _SLICE))
        self.meter.spent("wait", began, time.monotonic())

    def _look_around(self, now: float) -> None:
        lane = next(iter(self._flights), None)
        if lane is None:
            return
        if (peer := self._board.read()) is not None:
            raise peer_error(self.label, lane.bucket, *peer)
        if now - lane.issued_at > self._timeout:
            self._guarded(lane, lambda: self._give_up_waiting(lane))

    def _give_up_waiting(self, lane: Lane) -> None:
        kinds = ", ".join(job.kind.__name__ for job in lane.jobs)
        raise HookTimeoutError(f"{kinds} did not end within {self._timeout:g} s; a peer is gone, late or stuck.")

    def _guarded(self, lane: Lane, step: Callable[[], None]) -> None:
        """Run a piece of a lane; whatever it raises becomes the failure that every rank will hear of."""
        try:
            step()
        except Exception as error:
            peer = self._board.read_soon(2.0) if is_lost_connection(error) else None
            if peer is not None:
                raise peer_error(self.label, lane.bucket, *peer, cause=error) from error
            failure = own_error(self.label, lane.bucket, error)
            self._board.post(str(failure).partition(": ")[2])
            raise failure from error


@atexit.register
def _close_all() -> None:
    for driver in list(_drivers):
        driver.close()
    sweep(at_exit=True)
