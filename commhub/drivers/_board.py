"""Where a rank says that it failed, left or lost a connection, for its peers to read, and answers when it is called.

It lies in the registration's store. ``news`` counts what was said: who reads the same number as before asks for
nothing else. ``failed`` is the verdict, the first that any rank writes: what failed there, or who is gone. ``left/r``
says that rank r takes part no more. ``answer/r`` holds the last number that rank r has seen, and what it does.

The store may be gone, or say nothing more; neither is a second error, and nobody waits for it.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from typing import TYPE_CHECKING, Any

import attrs

from ._store import Errand, is_held_here, peek, told_lost, within
from ._told import told_left

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from torch.distributed.distributed_c10d import Store

FAREWELL = 2.0
"""Seconds that the store's holder stays for peers that have yet to read what went wrong."""
_ANSWERS_WITHIN = 0.05
"""Seconds in which the store answers; it takes less than one of them in a thousand where it is alive."""
_PAUSE = 0.05
"""Seconds between two looks at who has answered a call."""

_READ_BY_THEN = 30.0
"""Seconds after which nobody stays for who has not read it."""

_FEW = 2
"""Boards that may stay open before it is looked whether they have been read."""

_owed: dict[FailureBoard, float] = {}
"""On which something new stands that peers may have yet to read, in a store that ends with this process; and since
when."""
_looking_after: list[Errand[None]] = []
"""Looks whether they have read it."""


@attrs.frozen
class Roll:
    """What came of calling the peers.

    Attributes:
        found: the verdict that was there, or came meanwhile.
        left: what the ranks said that take part no more, by rank.
        doing: what the others that answered do, as they said it.
        silent: who has said nothing.
        store: why the store cannot be asked; empty if it can.
    """

    found: str | None = None
    left: dict[int, str] = attrs.Factory(dict)
    doing: dict[int, Any] = attrs.Factory(dict)
    silent: tuple[int, ...] = ()
    store: str = ""


class FailureBoard:
    """One registration's.

    Args:
        store: a prefix that nothing else uses.
        rank, size: in the registration's group.

    Attributes:
        doing: asked when a peer calls: what this rank does, in JSON; ``Doing.read`` understands it.
    """

    def __init__(self, store: Store, rank: int, size: int) -> None:
        self.doing: Callable[[], Any] = _connecting
        self._store, self._rank, self._size = store, rank, size
        self._is_held, self._is_gone = is_held_here(store), False
        self._pid = os.getpid()
        self._look: Errand[None] | None = None
        self._looking = threading.Lock()
        self._heard = 0
        self._found: str | None = None
        self._by: int | None = None
        self._gone: list[int] = []
        self._left: dict[int, str] = {}

    # What this rank says.

    def post(self, text: str) -> None:
        """Tell the peers why this rank stopped."""
        self.decide(f"rank {self._rank} failed: {text}")

    def decide(self, told: str, gone: Collection[int] = ()) -> str:
        """Write what went wrong, unless a verdict is there already; the one that holds.

        Args:
            told: a sentence that begins with the rank that is to blame.
            gone: the ranks that nobody needs to tell.
        """
        printable = told.encode("utf-8", "backslashreplace").decode()
        word = json.dumps([self._rank, list(gone), printable])
        with contextlib.suppress(RuntimeError, ValueError, TimeoutError):
            within(2.0, lambda: self._decide(word))
        return self._found if self._by not in (None, self._rank) and self._found else told

    def leave(self, text: str) -> None:
        """Tell the peers that this rank takes part no more, and how, in a predicate. Nobody waits for it."""
        if self._size == 1:
            return
        printable = text.encode("utf-8", "backslashreplace").decode()

        def say() -> None:
            with contextlib.suppress(RuntimeError, ValueError):
                self._store.set(f"left/{self._rank}", printable)
                self._heard = int(self._store.add("news", 1))

        with contextlib.suppress(RuntimeError):  # no thread begins any more
            Errand(say)
        self._owe()

    # What this rank hears.

    def read(self) -> str | None:
        """What went wrong elsewhere, if something did; answers who calls. Asks the store, so call it seldom."""
        if self._size == 1 or self._is_gone:
            return self._found
        with self._looking:
            if self._look is None or self._look.wait(0.0):
                self._look = Errand(self._read)
            if self._look.wait(_ANSWERS_WITHIN):
                self._look = None
        return self._found

    def left(self, members: Collection[int]) -> str | None:
        """Which of the members take part no more, as far as ``read`` has found out."""
        return told_left({rank: self._left[rank] for rank in members if rank in self._left})

    def call(self) -> Errand[int]:
        """Ask all ranks to answer; the number that an answer must have reached, in time."""
        return Errand(lambda: int(self._store.add("news", 1)))

    def roll_call(self, seconds: float, called: Errand[int] | None = None) -> Roll:
        """Wait until all ranks have answered, a verdict is there, or the time is up.

        Args:
            seconds: to wait.
            called: a call made before; default: one made now.
        """
        called = called or self.call()
        try:
            end = time.monotonic() + seconds
            return within(seconds + 1.0, lambda: self._gather(called, end))
        except (RuntimeError, ValueError, TimeoutError) as error:
            return Roll(found=self._found, left=dict(self._left), store=self.lost(error))

    def lost(self, error: BaseException) -> str:
        """Why the store cannot be asked, a sentence without an end."""
        return told_lost(self._store, self._size, error)

    def retire(self, *, is_read: bool) -> None:
        """This rank does nothing any more; ``is_read``: and nobody reads this, as all ranks have agreed."""
        self.doing = _closed
        if is_read:
            _owed.pop(self, None)

    # In the store, which may take any time to answer.

    def _decide(self, word: str) -> None:
        self._understand(self._store.compare_set("failed", "", word))
        self._take(int(self._store.add("news", 1)))

    def _read(self) -> None:
        try:
            self._catch_up()
        except (RuntimeError, ValueError):  # it is not asked again, which torch would complain of each time
            self._is_gone = True

    def _catch_up(self) -> None:
        news = int(self._store.add("news", 0))
        if news != self._heard:
            self._take(news)

    def _take(self, news: int) -> None:
        """Take in what was said, and say so."""
        if (word := peek(self._store, "failed")) is not None:
            self._understand(word)
        for rank in self._others():
            if rank not in self._left and (text := peek(self._store, f"left/{rank}")) is not None:
                self._left[rank] = text.decode()
        self._store.set(f"answer/{self._rank}", json.dumps([news, self.doing()]))
        self._heard = news

    def _understand(self, word: bytes) -> None:
        by, gone, told = json.loads(word)
        if by != self._rank:
            mine = f"rank {by} has given this rank up, which did not answer in time: {told}"
            self._found = mine if self._rank in gone else told
        self._by, self._gone = by, gone
        self._owe()

    def _others(self) -> list[int]:
        return [rank for rank in range(self._size) if rank != self._rank]

    def _gather(self, called: Errand[int], end: float) -> Roll:
        if not called.wait(max(0.0, end - time.monotonic())):
            raise TimeoutError
        number = called.result()
        doing: dict[int, Any] = {}
        while True:
            self._catch_up()
            for rank in self._others():
                if rank not in doing and (told := self._answer(rank, number)) is not None:
                    doing[rank] = told
            silent = tuple(rank for rank in self._others() if rank not in doing and rank not in self._left)
            if self._found is not None or not silent or time.monotonic() > end:
                return Roll(self._found, dict(self._left), doing, silent)
            time.sleep(_PAUSE)

    def _answer(self, rank: int, number: int) -> Any:
        seen, doing = json.loads(peek(self._store, f"answer/{rank}") or b"[-1, null]")
        return doing if seen >= number else None

    def _owe(self) -> None:
        if self._is_held:
            now = time.monotonic()
            for board, since in list(_owed.items()):
                if now - since > _READ_BY_THEN:
                    _owed.pop(board, None)
            _owed[self] = now
            if len(_owed) > _FEW and all(errand.wait(0.0) for errand in _looking_after):
                with contextlib.suppress(RuntimeError):  # no thread begins any more
                    _looking_after[:] = [Errand(_forget_what_was_read)]

    def _stay(self, end: float) -> None:
        """Wait until every peer that is still there has read all this."""
        number = int(self._store.add("news", 0))
        while self._unread(number) and time.monotonic() < end:
            time.sleep(0.01)

    def _unread(self, number: int) -> list[int]:
        """The peers that are still there and have yet to read this number."""
        return [
            rank
            for rank in self._others()
            if rank not in self._gone
            and self._answer(rank, number) is None
            and peek(self._store, f"left/{rank}") is None
        ]


def _forget_what_was_read() -> None:
    """Let go of the boards, and of their connections, that nobody has to stay for any more."""
    for board, since in list(_owed.items()):
        with contextlib.suppress(RuntimeError, ValueError):
            if board._pid == os.getpid() and board._unread(int(board._store.add("news", 0))):
                continue
        if _owed.get(board) == since:
            _owed.pop(board, None)


def take_leave() -> None:
    """At exit: where the store ends with this process, wait a moment for peers that have yet to read what is bad."""
    end = time.monotonic() + FAREWELL
    while _owed and time.monotonic() < end:
        board, _ = _owed.popitem()
        if board._pid != os.getpid():
            continue  # the connection is the parent's
        with contextlib.suppress(RuntimeError, ValueError, TimeoutError):
            within(end - time.monotonic(), lambda board=board: board._stay(end))  # type: ignore[misc]


def _connecting() -> str:
    return "connects its groups"


def _closed() -> str:
    return "has closed its registration"
