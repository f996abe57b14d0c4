"""What the communication thread looks out for: its own hook, its peers' failures and questions, and the time."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from commhub._errors import HookError, HookTimeoutError

from ._failure import is_lost_connection, own_error, peer_error
from ._notice import Notice
from ._progress import Doing, Progress, told_behind
from ._told import described_briefly, told_left, told_silent

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

    from ._board import FailureBoard, Roll
    from ._signature import Signatures
    from ._store import Errand
    from ._task import Task

SLICE = 0.5
"""Seconds of an uninterrupted wait, and between looks at the board."""
_SOON = 0.1
"""Seconds that a task has waited before anything is looked at on its behalf."""
_SELDOM = 1.0
"""Seconds between looks at the board while nothing is asked of anybody."""
_ROLL_CALL = 2.0
"""Seconds in which a rank that is there answers: it looks at the board once in one of them."""
_EARLY = 1.7
"""Seconds before the timeout, or half of it, when the peers are called, so that their answers are there by then."""
_LEAVING = 0.4
"""Seconds in which what a rank has sent arrives after it has left."""


class Watch:
    """Guards every piece of a task, and ends waits that lead nowhere.

    ``given_up`` is set by a thread that waits no longer: the piece under way then leads to nothing. ``progress`` knows
    where this rank is, for its peers.

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
        self.progress = Progress()
        self._looked, self._waited = 0.0, -SLICE
        self._has_lost = False
        self._left_since: float | None = None
        self._called: tuple[float, float, Errand[int]] | None = None
        self._busy: tuple[Task, float] | None = None
        self._notice = Notice(board, signatures.size, timeout, label)

    def guarded(self, task: Task, step: Callable[[], None]) -> None:
        """Run a piece of a task; whatever it raises becomes the failure that every rank will hear of."""
        try:
            self._busy = task, time.monotonic()
            try:
                step()
            finally:
                self._busy = None  # what follows is not the hook's time
        except BaseException as error:
            if self.given_up is not None:
                raise self.given_up from error
            if is_lost_connection(error):
                raise self._lost(task, error) from error
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
        waited = now - since
        if waited <= self.timeout and (waited <= _SOON or now - self._looked <= SLICE):
            return
        self._looked = self._waited = now
        members = self._members(task)
        if (told := self.board.read()) is not None or (told := self._left(members, now)) is not None:
            raise peer_error(self.label, task.bucket, told)
        self.guarded(task, lambda: self.signatures.answer(waiting))
        self._notice.look(task, since, members, self._who)
        if waited > self.timeout - min(_EARLY, self.timeout / 2) and (self._called is None or self._called[0] != since):
            self._called = since, now, self.board.call()
        if waited > self.timeout:
            raise self._timed_out(task, now, members)

    def look_seldom(self) -> None:
        """Look at the board where nothing is asked of anybody, to answer peers who call; about once a second."""
        now = time.monotonic()
        if now - self._looked > _SELDOM:
            self._looked = now
            self.board.read()

    def doing(self) -> dict[str, Any]:
        """What this rank does and where it is, for peers who ask why it does not come: see ``Doing``."""
        busy, place = self._busy, self.progress.place()
        if self._has_lost:
            return self.progress.said("has lost a connection", waits=False)
        if busy is not None and (seconds := time.monotonic() - busy[1]) > SLICE:
            bucket = busy[0].bucket
            told = f"has been in the hook's code for {seconds:.1f} s (bucket {bucket.index}, step {bucket.step})"
            return self.progress.said(told, waits=False)
        if place:
            return self.progress.said(f"waits for {place}", waits=True)
        waits = time.monotonic() - self._waited <= 2 * SLICE
        told = "waits for a peer's answer" if waits else "asks for nothing at present"
        last = self.progress.last and f", and came last to {self.progress.last}"
        return self.progress.said(f"{told}{last}", waits=False)

    def answer_if_busy(self, now: float) -> None:
        """Answer peers who call while the hook's code does not return. Any thread may."""
        busy = self._busy
        if busy is not None and now - busy[1] > SLICE:
            self.board.read()

    def _members(self, task: Task) -> Sequence[int]:
        group = task.jobs[0].group if task.jobs else None
        return range(self.signatures.size) if group is None else group.ranks

    def _left(self, members: Sequence[int], now: float) -> str | None:
        """Who of the members has left, once what it sent before had the time to arrive."""
        told = self.board.left(members)
        if told is None:
            self._left_since = None
        elif self._left_since is None:
            self._left_since = now
        elif now - self._left_since > _LEAVING:
            return told
        return None

    def _lost(self, task: Task, error: BaseException) -> HookError:
        """What is behind a lost connection: seldom its first cause."""
        self._has_lost = True
        roll = self.board.roll_call(_ROLL_CALL)
        told = roll.found or self._missed(roll, self._members(task))
        if told is None:
            told = f"rank {self.signatures.rank} lost a connection, and every rank answers: {described_briefly(error)}"
        if roll.found is None:
            told = self.board.decide(told, roll.silent)
        return peer_error(self.label, task.bucket, told, cause=error)

    def _missed(self, roll: Roll, members: Sequence[int]) -> str | None:
        """Whose absence a lost connection tells of."""
        left = told_left({rank: text for rank, text in roll.left.items() if rank in members})
        if roll.store:
            return left or f"{roll.store}; the last that this rank knew: a connection to a peer was lost"
        if roll.silent:
            return told_silent(roll.silent, closed=True)
        return left

    def _timed_out(self, task: Task, now: float, members: Sequence[int]) -> HookError:
        """The error of a task that has waited too long, and who keeps it waiting."""
        assert self._called is not None
        _, at, call = self._called
        roll = self.board.roll_call(max(0.1, at + min(_EARLY, _ROLL_CALL) - now), call)
        if roll.found is not None:
            return peer_error(self.label, task.bucket, roll.found)
        kinds = ", ".join(job.kind.__name__ for job in task.jobs) or "a peer's answer"
        who = self._who(roll, members)
        told = HookTimeoutError(f"{kinds} did not end within {self.timeout:g} s; {who}.")
        failure = own_error(self.label, task.bucket, told)
        if roll.silent:
            self.board.decide(f"{who}; on rank {self.signatures.rank} {kinds} did not end in time", roll.silent)
        else:
            self.board.post(str(failure).partition(": ")[2])
        return failure

    def _who(self, roll: Roll, members: Sequence[int]) -> str:
        """Who keeps this rank waiting: a sentence without its end."""
        if silent := _silent(roll):
            return silent
        left = told_left({rank: text for rank, text in roll.left.items() if rank in members})
        if left is not None:
            return left
        rank = self.signatures.rank
        answers = {rank: self.doing(), **{r: answer for r, answer in roll.doing.items() if r not in roll.left}}
        return told_behind(rank, {r: Doing.read(answer) for r, answer in sorted(answers.items())})

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
            roll = self.board.roll_call(_ROLL_CALL)
            left = told_left(roll.left)
            told = roll.found or left or f"{self.board.lost(error)}; the last that this rank knew: it asked its peers"
            raise peer_error(self.label, task.bucket, told, cause=error) from error


def _silent(roll: Roll) -> str:
    """Who does not answer, a sentence without its end; empty if all do."""
    if roll.store:
        return f"{roll.store}, so that nobody knows which peer is gone, late or stuck"
    if not roll.silent:
        return ""
    names, one = ", ".join(map(str, roll.silent)), len(roll.silent) == 1
    return f"rank{'' if one else 's'} {names} do{'es' if one else ''} not answer: gone, stopped or stuck"
