"""The driver for tensors in host memory: one communication thread and a Gloo group of its own per registration.

Here is what the training thread calls, and the life of the communication thread; ``Pipeline`` is what that thread
does in a round. Nothing runs in Gloo's threads. See HOW_IT_WORKS.md in this folder.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
import threading
import time
import weakref
from typing import TYPE_CHECKING

import torch

from commhub._errors import HookError, described

from . import _graveyard, _ranges
from ._board import take_leave
from ._failure import Stopped
from ._inbox import Inbox
from ._link import emulate, network_of
from ._pipeline import Pipeline
from ._threads import to_its_end
from ._told import described_briefly
from ._watch import SLICE, Watch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from commhub.protocol._collectives import Subgroup

    from ._board import FailureBoard
    from ._communicator import Communicator
    from ._network import Network
    from ._signature import Signatures
    from ._task import Task
    from ._timeline import Recorder

_ENDS_WITHIN = 3.0
"""Seconds in which a collective that was given up has ended; it takes some milliseconds."""
_CLOSES_WITHIN = 4.0
"""Seconds in which the communication thread has noticed that it is to end, and has ended what is in flight."""
_drivers: weakref.WeakSet[ThreadDriver] = weakref.WeakSet()


class ThreadDriver:
    """Drives tasks in rounds: ``submit`` each bucket, ``end_round`` after the last, ``wait`` until all are complete.

    Args:
        communicator: the groups to communicate on.
        board: where ranks report failures.
        signatures: compares what the ranks ask for.
        meter: keeps what happened when.
        timeout: seconds after which a collective has failed, and a hook that has not returned.
        label: the hook's name, distribution and version, for errors.
    """

    confirms = True

    def __init__(
        self,
        communicator: Communicator,
        board: FailureBoard,
        signatures: Signatures,
        meter: Recorder,
        *,
        timeout: float,
        label: str,
    ) -> None:
        self.meter, self.label = meter, label
        self.failure: HookError | None = None
        self.partitions = 0
        self._board, self._inbox = board, Inbox()
        self._watch = Watch(board, signatures, timeout, label)
        self._pipeline = Pipeline(communicator, self._inbox, self._watch, meter)
        self._in_use = self._untold = ""
        self._letting_go = False
        self._thread: threading.Thread | None = None
        self._pid = os.getpid()
        _drivers.add(self)

    @property
    def communicator(self) -> Communicator:
        """What collectives are issued on. Between steps, a wrapper of it may take its place."""
        return self._pipeline.communicator

    @communicator.setter
    def communicator(self, communicator: Communicator) -> None:
        self._pipeline.communicator = communicator

    @property
    def network(self) -> Network | None:
        """The network that the communicator is emulated over."""
        return network_of(self.communicator)

    @network.setter
    def network(self, network: Network | None) -> None:
        self.communicator = emulate(self.communicator, network)

    # Called by the training thread.

    def connect(self, groups: Sequence[Sequence[int]]) -> Sequence[Subgroup]:
        """Communicators among disjoint groups of ranks."""
        self.partitions += 1
        return self.communicator.connect(groups)

    def future(self) -> torch.futures.Future[torch.Tensor]:
        """A future for one bucket."""
        return torch.futures.Future()

    def listen(self) -> None:
        """Answer peers who call from now on, and not only from the first task."""
        self._board.doing = self._watch.doing
        if self._thread is None:
            self._thread = threading.Thread(target=self._serve, name="commhub", daemon=True)
            self._thread.start()

    def submit(self, task: Task) -> None:
        """Take the round's next bucket. Its exchange goes on in the background."""
        if self._inbox.closing and self.failure is None:
            self.failure = HookError(f"{self.label}: this registration was closed. Register again.")
        if self.failure is not None:
            task.complete()
            return
        self.listen()
        self._inbox.put(task)

    def end_round(self) -> None:
        """Say that no more buckets come until ``wait`` has returned."""
        self._inbox.end()

    def wait(self) -> None:
        """End the round and block until every task is complete. Failures are in ``failure``.

        A Ctrl-C meanwhile is a failure too, and is raised.
        """
        self.meter.block()
        try:
            self._inbox.end()
            with _ranges.blocked(self.meter.hook), self._inbox.changed:
                while not self._inbox.idle:
                    self._inbox.changed.wait(SLICE)
                    self._watch.answer_if_busy(time.monotonic())
                    overdue = self._watch.overdue(time.monotonic())
                    if self._thread is not None and not self._thread.is_alive():
                        overdue = HookError(f"{self.label}: the communication thread has ended. Register again.")
                    if overdue is not None and not self._inbox.idle:
                        self._leave(overdue)
        except BaseException as error:
            self._leave(HookError(f"{self.label}: training was interrupted by {type(error).__name__}."))
            raise
        finally:
            self.meter.unblock()
            untold, self._untold = self._untold, ""
            if untold:
                self._board.post(untold)

    def in_use(self) -> str:
        """Why memory of this driver's buckets may still be written to, for people; empty if it is not.

        A thread that is about to let go of them is waited for, a moment.
        """
        end = time.monotonic() + 0.3
        with self._inbox.changed:
            while self._in_use and self._letting_go and time.monotonic() < end:
                self._inbox.changed.wait(0.1)
        return self._in_use

    def tell(self, text: str) -> None:
        """Say to peers that connect their groups, or train on, why this rank does not."""
        self._board.post(text)

    def close(self, leaving: str = "") -> None:
        """Stop the thread and free the group; a step under way is given up. Does nothing in a forked child.

        Args:
            leaving: how this rank leaves peers behind that go on, a predicate; empty where all ranks close.
        """
        if os.getpid() != self._pid:
            return
        with self._inbox.changed:
            is_first, self._inbox.closing = not self._inbox.closing, True
            is_idle = self._inbox.idle
            if is_first and self.failure is None and not (is_idle and not leaving):
                where = "" if is_idle else " in the middle of a step"
                self._board.leave(f"{leaving or 'has closed its registration'}{where}")
            self._inbox.changed.notify_all()
        self._board.retire(is_read=is_idle and not leaving)
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(timeout=0.2 if self._in_use else _CLOSES_WITHIN)
        self._thread = None
        self.communicator.close()

    def _leave(self, failure: HookError) -> None:
        """Let training go on without the communication thread, which holds on to the buckets."""
        with self._inbox.changed:
            if self._inbox.idle:
                return
            self._watch.given_up = failure
            self.failure = self.failure or failure  # the first, where its hook is stuck while it is being closed
            self._letting_go = True
            self._in_use, self._untold = str(failure), str(failure).partition(": ")[2]
            for task in (*self._pipeline.active, *self._inbox.arrived):
                task.complete()
            self._inbox.idle = True

    # The communication thread.

    def _serve(self) -> None:
        inbox = self._inbox
        while True:
            with inbox.changed:
                while not inbox.arrived and not inbox.closing:
                    if inbox.ended:
                        inbox.idle = True
                        inbox.changed.notify_all()
                    if not inbox.changed.wait(SLICE) and not inbox.arrived and inbox.idle:
                        break
                closing = inbox.closing
                is_idle = not inbox.arrived and not closing
            if is_idle:
                self._watch.look_seldom()
                continue
            if closing:
                if inbox.arrived:
                    self._give_up()
                return
            try:
                if self.failure is None:
                    self._pipeline.round()
            except Stopped:
                self._give_up()
                return
            except HookError as failure:
                self.failure = self.failure or failure
            except BaseException as error:  # noqa: BLE001 - whatever it is, this thread must answer for its tasks
                self.failure = self.failure or HookError(f"{self.label}: the driver failed: {described(error)}")
                self.failure.__cause__ = error
                self._board.post(described(error))
            if self.failure is not None:
                self._give_up()
            inbox.rest()

    def _give_up(self) -> None:
        """End what is in flight, and only then let go of the buckets; then close the hooks' exchanges.

        Nobody waits for that: a hook may do anything while it is closed, and for long.
        """
        hopeless = not self.communicator.abort(_ENDS_WITHIN)
        tasks = [*self._pipeline.active, *self._inbox.arrived]
        with self._inbox.changed:
            self._letting_go = not hopeless
            self._in_use = (
                f"{self.label}: a collective that was given up has not ended, and would write into later gradients. "
                "This model cannot be used any more; end this process."
                if hopeless
                else f"{self.label}: the hook has not returned from being closed, after {self.failure or 'that'}"
            )
            for task in tasks:
                task.complete()
            self._inbox.rest()
        for task in tasks:
            task.cancel()
        self._pipeline.forget()
        with self._inbox.changed:
            for task in tasks:
                with contextlib.suppress(ValueError):
                    self._inbox.arrived.remove(task)
            if not hopeless:
                self._in_use = ""
            self._inbox.rest()


def _close_all() -> None:
    error = getattr(sys, "last_exc", None) or getattr(sys, "last_value", None)
    how = "has exited" if error is None else f"has exited: {described_briefly(error)}"
    for driver in list(_drivers):
        driver.close(how)
    take_leave()
    _graveyard.close_all()


atexit.register(to_its_end, _close_all)
