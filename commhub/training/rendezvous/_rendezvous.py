"""Where the ranks of a group meet: in the group's store, all in the same rendezvous, whatever was called before.

A call that takes all ranks is one rendezvous. Who comes draws the next number of a counter in the store, and as many
numbers in a row as there are ranks make one rendezvous: no rank keeps a count of its own that could stay behind.
A rendezvous has rounds, and a round has one verdict, written by compare-and-set. Who came last writes what everyone
brought; who has waited too long writes who came until then. The first to write decides and all others take it, so
that nobody succeeds in a round that failed for somebody else. Who has waited too long also raises the counter to the
rendezvous's last number: with that the rendezvous is over, and whoever comes later begins the next one.
"""

from __future__ import annotations

import contextlib
import json
import logging
import threading
import time
import weakref
from functools import partial
from typing import TYPE_CHECKING

import attrs
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store

from commhub._errors import RegistrationError
from commhub.drivers._board import FAREWELL
from commhub.drivers._notice import SILENT
from commhub.drivers._store import is_held_here, own_connection, peek, told_lost, wait_for, within

from ._unanswered import connected, counter, say, told
from ._verdict import Verdict

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch.distributed.distributed_c10d import ProcessGroup

_VERDICT = "verdict"
_STRAGGLING = 0.5
"""Seconds for those who have drawn a number and have yet to write what they bring."""
_ANSWERS_WITHIN = 2.0
"""Seconds that all the store's answers of a round take at most."""
_TIDY_EVERY = 32
"""Meetings between two tidyings, whose hundred or so deletions no single rendezvous should pay for."""

_in_use: weakref.WeakKeyDictionary[Store, tuple[str, int]] = weakref.WeakKeyDictionary()
"""The parts of stores that something works on, with group and rendezvous; tidying spares them."""
_lock = threading.Lock()
logger = logging.getLogger("commhub")


@attrs.define(eq=False)
class Rendezvous:
    """A place in the group's store that only this occasion uses, the same on every rank.

    Attributes:
        missed: the verdict of the rendezvous before, where others had come to it and waited for this rank in vain.
        unanswered: which of those who do not come had given up because the store did not answer, for people.
        topic: the call that it is for, for the log.
    """

    group: str
    rank: int
    size: int
    timeout: float
    topic: str = attrs.field(default="a call of all ranks", init=False)
    _base: Store
    _numbers: tuple[int, ...] = ()
    missed: Verdict | None = attrs.field(default=None, init=False)
    unanswered: str = attrs.field(default="", init=False)
    _number: int | None = None
    _is_last: bool = False
    _rounds: int = 0
    _abandoned: bool = False

    @classmethod
    def of(cls, group: ProcessGroup, timeout: float, *, numbered: bool = False) -> Rendezvous:
        """The group's next rendezvous. It begins with the first round, or the first ``branch``.

        ``numbered``: whether ranks are called by their numbers among all ranks, and not by those in the group.

        Raises:
            RegistrationError: if the group has no store.
        """
        try:
            rank, size = dist.get_rank(group), dist.get_world_size(group)
            numbers = dist.get_process_group_ranks(group) if numbered else ()
        except (ValueError, RuntimeError, KeyError, TypeError) as error:
            text = f"the process group is gone ({error}). Registrations end before destroy_process_group() is called."
            raise RegistrationError(text) from error
        given = partial(dist.distributed_c10d._get_process_group_store, group)
        return cls(group.group_name, rank, size, timeout, connected(group, given, rank, size, timeout), tuple(numbers))

    def called(self, rank: int) -> int:
        """The number under which people know a rank."""
        return self._numbers[rank] if self._numbers else rank

    def branch(self, name: str) -> Store:
        """A part of the store for something made at this rendezvous."""
        part = PrefixStore(name, self._store())
        with _lock:
            _in_use[part] = self.group, self._number or 0
        return part

    def round(self, mine: str, patience: float, goes_on: Callable[[Verdict], bool]) -> Verdict:
        """Bring ``mine`` to the next round, and hear its verdict when all have come or one has waited too long.

        A wait of more than ten seconds is logged, once, with those who are waited for.

        Args:
            mine: for the others to read.
            patience: how many seconds to wait for them.
            goes_on: whether another round follows on a verdict. If not, who holds the store stays until all have heard.

        Raises:
            RegistrationError: if the store does not answer; that takes some seconds more than the patience.
        """
        try:
            return within(patience + self._lasts, lambda: self._hear_out(mine, patience, goes_on))
        except (TimeoutError, RuntimeError) as error:
            self._abandoned = True
            raise RegistrationError(self._lost(error)) from error
        except BaseException:  # an interrupt: what waits in the background must not count as this rank
            self._abandoned = True
            with contextlib.suppress(TimeoutError, RuntimeError):
                within(1.0 + (FAREWELL if self._holds_the_store() else 0.0), self._leave)
            raise

    @property
    def _lasts(self) -> float:
        """Seconds that a round lasts at most beyond the patience, where the store answers."""
        return _STRAGGLING + _ANSWERS_WITHIN + (FAREWELL if self._holds_the_store() else 0.0)

    def _lost(self, error: Exception) -> str:
        """What a store that fails means, and what this rank knew."""
        knew = "it waited for the others to come" if self._rounds < 2 else "all had come, and it waited for their word"
        lost = told_lost(self._base, self.size, error)
        return f"{lost} ({error}); the last that this rank ({self.rank}) knew: {knew}."

    # In the store, which may take any time to answer.

    def _store(self) -> Store:
        if self._number is None:
            drawn = self._base.add(self._counter, 1) - 1
            self._is_last = drawn % self.size == self.size - 1
            self._number = drawn // self.size
        return PrefixStore(str(self._number), self._base)

    @property
    def _counter(self) -> str:
        return counter(self.size)

    @property
    def _place(self) -> Store:
        """Where the present round is held."""
        return PrefixStore(str(self._rounds), self._store())

    def _hear_out(self, mine: str, patience: float, goes_on: Callable[[Verdict], bool]) -> Verdict:
        """Hold the round. Where nobody waits for it any more, the store has been silent, and is told that."""
        try:
            return self._hold(mine, patience, goes_on)
        finally:
            if self._abandoned and self._number is not None:
                say(self._base, self.rank, self._number, patience)

    def _hold(self, mine: str, patience: float, goes_on: Callable[[Verdict], bool]) -> Verdict:
        place = self._enter(mine)
        if self._is_last:
            brought = self._brought({self.rank: mine}, self.size, min(patience, SILENT))
            if patience > SILENT and len(brought) < self.size:
                self._tell(patience)
                brought = self._brought(brought, self.size, patience - SILENT)
            verdict = self._decide(brought, patience)
        elif self._hears(patience):
            verdict = Verdict.read(peek(place, _VERDICT))
        else:
            drawn = self._close()
            verdict = self._decide(self._brought({self.rank: mine}, drawn, _STRAGGLING), patience)
            self._look_back()
        if missing := [rank for rank in range(self.size) if rank not in verdict.brought]:
            self.unanswered = told(self._base, self.rank, self.size, self._number or 0, missing)
        if not goes_on(verdict):
            self._take_leave(verdict)
        first = self._rounds == 1 and len(verdict.brought) == self.size
        if first and self.rank == 0 and (self._number or 0) % _TIDY_EVERY == _TIDY_EVERY - 1:
            self._tidy()
        return verdict

    def _hears(self, patience: float) -> bool:
        """Wait for the verdict; whether it is there."""
        if wait_for(self._place, [_VERDICT], min(patience, SILENT)):
            return True
        if patience <= SILENT:
            return False
        self._tell(patience)
        return wait_for(self._place, [_VERDICT], patience - SILENT)

    def _tell(self, patience: float) -> None:
        """Log who is waited for."""
        missing = [rank for rank in range(self.size) if rank != self.rank and peek(self._place, str(rank)) is None]
        if missing and not self._abandoned:
            logger.warning(
                "%s waits for rank%s %s of 0..%d (%g s so far, until %g s); it is to be called on all ranks.",
                self.topic,
                "s" if len(missing) > 1 else "",
                ", ".join(str(self.called(rank)) for rank in missing),
                self.called(self.size - 1),
                SILENT,
                patience,
            )

    def _enter(self, mine: str) -> Store:
        """Come to the next round. ``_is_last`` tells whether all others are there already, or about to write."""
        self._rounds += 1
        place = self._place
        if self._abandoned:
            raise TimeoutError("too late")  # nobody listens any more
        place.set(str(self.rank), mine)
        if self._rounds > 1:
            self._is_last = place.add(self._counter, 1) == self.size
        return place

    def _close(self) -> int:
        """See to it that nobody enters this round any more, and the first also ends the rendezvous; how many have."""
        first = self._rounds == 1
        store, before = (self._base, self.size * (self._number or 0)) if first else (self._place, 0)
        full = before + self.size
        came = int(store.add(self._counter, 0))
        while came < full:
            now = int(store.compare_set(self._counter, str(came), str(full)))
            if now >= full:
                break
            came = now
        return min(came, full) - before

    def _brought(self, brought: dict[int, str], expected: int, patience: float) -> dict[int, str]:
        """What the ranks bring, as soon as ``expected`` of them have written it or the time is up."""
        place = self._place
        end = time.monotonic() + patience
        while True:
            for rank in range(self.size):
                if rank not in brought and (found := peek(place, str(rank))) is not None:
                    brought[rank] = found.decode()
            left = end - time.monotonic()
            if len(brought) >= expected or left <= 0:
                return brought
            if self._is_last:
                wait_for(place, [str(rank) for rank in range(self.size) if rank not in brought], left)
            elif place.check([_VERDICT]):
                return brought
            else:
                time.sleep(0.01)

    def _look_back(self) -> None:
        """See whether the ranks that do not come had come to the rendezvous before, and this rank had not."""
        if self._rounds == 1 and self._number:
            former = PrefixStore("1", PrefixStore(str(self._number - 1), self._base))
            verdict = Verdict.read(peek(former, _VERDICT))
            if verdict.brought and self.rank not in verdict.brought:
                self.missed = verdict

    def _decide(self, brought: dict[int, str], waited: float, left: int | None = None) -> Verdict:
        """Write the verdict, unless there is one; the one that holds."""
        text = json.dumps([waited, left, brought])
        return Verdict.read(self._place.compare_set(_VERDICT, "", text))

    def _leave(self) -> None:
        """Decide the round without this rank, over another connection than the one that a wait is blocking."""
        if self._rounds and self._number is not None:
            me = attrs.evolve(self, base=own_connection(self._base, 1.0))
            me._close()
            me._take_leave(me._decide(me._brought({}, 0, 0.0), 0.0, self.rank))

    def _take_leave(self, verdict: Verdict) -> None:
        place = self._place
        if not self._holds_the_store():
            place.set(f"{self.rank} heard", "")
        else:
            wait_for(place, [f"{rank} heard" for rank in verdict.brought if rank != self.rank], FAREWELL)

    def _holds_the_store(self) -> bool:
        """Whether the store may end with this process."""
        return is_held_here(self._base)

    def _tidy(self) -> None:
        """Delete what former rendezvous left behind. All ranks have come to this one, so none is in those."""
        with _lock:
            spared = {number for group, number in _in_use.values() if group == self.group}
        with contextlib.suppress(RuntimeError):  # a store that cannot
            for key in self._base.list_keys():
                number = key.partition("/")[0]
                if number.isdigit() and int(number) < (self._number or 0) and int(number) not in spared:
                    self._base.delete_key(key)
