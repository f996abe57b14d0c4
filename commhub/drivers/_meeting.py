"""The store in which the members of a Gloo group find each other, watched meanwhile: nobody waits for who is gone."""

from __future__ import annotations

import contextlib
import json
import time
from typing import TYPE_CHECKING

from torch.distributed.distributed_c10d import ProcessGroupGloo, Store

from commhub._errors import HookMismatchError, RegistrationError

from ._store import Errand, peek, told_lost, within
from ._told import told_silent

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from datetime import timedelta

    from ._board import FailureBoard

_SLICE = 0.25
"""Seconds between looks at the board."""
_SHORTEST, _LONGEST = 0.0005, 0.01
"""Seconds between looks for the others' addresses."""
_GIVEN_UP = "given up"
_ROLL_CALL = 2.0
"""Seconds in which a rank that is there answers."""
_CONNECTS_WITHIN = 1.0
"""Seconds, or a quarter of the timeout, in which the store answers, and in which Gloo connects once all addresses are
there: both take milliseconds."""


class Unmet(RegistrationError):  # noqa: N818 - it is never seen: what all ranks agree on is raised in its place
    """A peer failed, or did not come: what this rank knows of it is second-hand."""


class Meeting(Store):
    """A store as Gloo uses one, whose waits are short questions: it stays free for others.

    Args:
        store: where the members leave their addresses; a prefix that nothing else uses.
        ranks: the members, in the registration's numbers.
        timeout: seconds to wait for them.

    Attributes:
        given_up: set by who waits no longer.
        is_complete: whether all addresses were there.
        served: when the store answered last, in monotonic seconds.
    """

    def __init__(self, store: Store, ranks: Sequence[int], timeout: float) -> None:
        super().__init__()
        self.given_up = self.is_complete = False
        self.served = time.monotonic()
        self._store, self._ranks, self._timeout = store, ranks, timeout
        self._end = time.monotonic() + timeout

    def hold(self, make: Callable[[], ProcessGroupGloo]) -> ProcessGroupGloo:
        """Make the group, unless the others have met before and given this rank up.

        Raises:
            Unmet: naming who did not come.
        """
        try:
            if (told := peek(self._store, _GIVEN_UP)) is not None:
                raise Unmet(told.decode())
            return make()
        except Unmet as error:
            with contextlib.suppress(RuntimeError):
                self._store.compare_set(_GIVEN_UP, "", str(error))
            raise

    def set(self, key: str, value: str) -> None:
        """Leave this rank's address."""
        self._store.set(key, value)

    def get(self, key: str) -> bytes:
        """An address that is there."""
        self.served = time.monotonic()
        return self._store.get(key)

    def wait(self, keys: list[str], _: timedelta | None = None) -> None:
        """Wait until members have left their addresses.

        Raises:
            Unmet: naming who has not in time.
        """
        pause = _SHORTEST
        while not self._store.check(keys):
            if self.given_up or time.monotonic() > self._end:
                missing = [self._rank_of(key) for key in keys if not self._store.check([key])]
                names = ", ".join(map(str, missing))
                many = "s" if len(missing) > 1 else ""
                raise Unmet(f"rank{many} {names} did not come to connect the ranks within {self._timeout:g} s.")
            self.served = time.monotonic()
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST)
        self.is_complete = True

    def _rank_of(self, key: str) -> int:
        return self._ranks[int(key.rpartition("/")[2])]


def connect(
    store: Store, ranks: Sequence[int], rank: int, timeouts: tuple[timedelta, timedelta], board: FailureBoard | None
) -> ProcessGroupGloo:
    """A Gloo group.

    Args:
        store: where its members meet; a prefix that nothing else uses.
        ranks: the members, in the registration's numbers.
        rank: this one, in the group.
        timeouts: how long to wait for the others now, and for collectives later.
        board: where peers say that they fail meanwhile.

    Raises:
        Unmet: if that is not possible, naming the rank to blame.
    """
    now, later = timeouts
    meeting = Meeting(store, ranks, now.total_seconds())
    soon = max(_CONNECTS_WITHIN, now.total_seconds() / 4)  # before those who are connected lose their patience
    errand = Errand(lambda: meeting.hold(lambda: ProcessGroupGloo(meeting, rank, len(ranks), now)))
    try:
        while not errand.wait(_SLICE):
            if board is not None and (told := board.read()) is not None:
                raise Unmet(told)
            if time.monotonic() - meeting.served > soon:
                if not meeting.is_complete:
                    raise Unmet(_unanswered(store, len(ranks)))
                raise RuntimeError(f"Gloo did not connect within {soon:g} s")
        group = errand.result()
    except Unmet:
        raise
    except RuntimeError as error:
        raise Unmet(_blamed(board, error)) from error
    finally:
        meeting.given_up = True
    group.set_timeout(later)
    return group


def compare(
    store: Store, rank: int, size: int, groups: list[list[int]], seconds: float, board: FailureBoard | None
) -> None:
    """See whether the first rank that came here makes the same groups.

    Args:
        store: a prefix that nothing else uses.
        rank, size: of this one, in the registration.
        groups: which it makes.
        seconds: in which the store answers.
        board: of the registration.

    Raises:
        HookMismatchError: if it does not, naming both.
        Unmet: if the store does not answer.
    """
    mine = json.dumps([rank, groups])
    try:
        first, theirs = json.loads(within(seconds, lambda: store.compare_set("groups", "", mine)))
    except TimeoutError as error:
        raise Unmet(_unanswered(store, size)) from error
    except RuntimeError as error:
        raise Unmet(_blamed(board, error)) from error
    if theirs != groups:
        raise HookMismatchError(
            f"the ranks partition themselves differently: rank {first} asks for {theirs} and rank {rank} for {groups}. "
            "Every rank makes the same groups, in the same order."
        )


def _unanswered(store: Store, size: int) -> str:
    lost = told_lost(store, size, TimeoutError())
    return f"{lost}; the last that this rank knew: the ranks were being connected."


def _blamed(board: FailureBoard | None, error: RuntimeError) -> str:
    """Why Gloo could not connect the ranks."""
    if board is None:
        return f"the ranks could not be connected: {error}"
    roll = board.roll_call(_ROLL_CALL)
    if roll.found is not None:
        return roll.found
    if roll.store:
        return f"{roll.store}; the last that this rank knew: the ranks were being connected."
    if not roll.silent:
        return f"the ranks could not be connected, though all of them answer: {error}"
    closed = any(word in str(error).lower() for word in ("closed", "reset", "refused"))
    told = f"{told_silent(roll.silent, closed=closed)} while the ranks were being connected"
    return board.decide(told, roll.silent)
