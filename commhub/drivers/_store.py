"""Stores that may never answer, because their machine is gone for instance: who asks them waits only so long."""

from __future__ import annotations

import atexit
import os
import threading
import time
import weakref
from datetime import timedelta
from typing import TYPE_CHECKING, Generic, TypeVar

import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore

from ._frozen import freeze
from ._threads import are_at_rest, to_its_end

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch.distributed.distributed_c10d import Store

T = TypeVar("T")

_NOTHING = "nothing"  # is never stored; it is the answer where nothing is
_TRIES = 3
_CONNECTS_WITHIN = 0.5
"""Seconds in which a store is connected to, or another try begins."""

_SHORTEST, _LONGEST = 0.0005, 0.25
"""Seconds between two questions whether something is there."""
_SHARE = 0.04
"""Of the time that something was waited for, how much passes before the next question."""
_RETURNS_WITHIN = 1.0
"""Seconds that an errand has at exit to end, and again to come to rest after that."""
_RESTS = 0.06
"""Seconds in which who goes on at all would have run; nobody pauses for longer between two questions."""

_threads: weakref.WeakSet[threading.Thread] = weakref.WeakSet()
_is_over = threading.Event()
"""Set when the interpreter ends and no errand may be under way any more."""


class Errand(Generic[T]):
    """``function()`` in a thread of its own, begun at once. A thread that never returns ends with the process.

    Raises:
        RuntimeError: if the interpreter ends.
    """

    def __init__(self, function: Callable[[], T]) -> None:
        if _is_over.is_set():
            raise RuntimeError("no errand begins any more: the interpreter ends")
        self._function = function
        self._over = threading.Event()
        self._value: list[T] = []
        self._error: BaseException | None = None
        thread = threading.Thread(target=self._run, name="commhub-errand", daemon=True)
        _threads.add(thread)
        thread.start()

    def _run(self) -> None:
        try:
            self._value.append(self._function())
        except BaseException as error:  # noqa: BLE001 - whoever asked raises it
            self._error = error
        self._over.set()

    def wait(self, seconds: float) -> bool:
        """Wait at most so long; whether it is over."""
        return self._over.wait(seconds)

    def result(self) -> T:
        """What the function returned or raised, once it is over."""
        if self._error is not None:
            raise self._error
        return self._value[0]


def within(seconds: float, function: Callable[[], T]) -> T:
    """What ``function()`` returns or raises.

    Raises:
        TimeoutError: if it does neither in so many seconds.
    """
    errand = Errand(function)
    if not errand.wait(seconds):
        raise TimeoutError(f"no answer within {seconds:g} s")
    return errand.result()


def own_connection(store: Store, seconds: float) -> Store:
    """The store through a connection of its own where it has such a thing, so that nobody's wait blocks a look.

    Each connection asks for its peer's name, and where the answer is lost it takes 5 s: then another one is tried.

    Raises:
        RuntimeError: if the store is gone.
    """
    tries: list[Errand[Store]] = []
    lives: Errand[bool] | None = None
    while True:
        if len(tries) < _TRIES:
            tries.append(Errand(store.clone))  # type: ignore[attr-defined]  # missing from the stub
        tries[-1].wait(_CONNECTS_WITHIN)
        made = next((one for one in tries if one.wait(0.0)), None)
        if made is not None:
            break
        lives = lives or Errand(lambda: store.check([""]))  # a connection to what is gone is tried until the timeout
        if lives.wait(0.0 if len(tries) > 1 else _CONNECTS_WITHIN):
            lives.result()
    try:
        mine = made.result()
        mine.set_timeout(timedelta(seconds=seconds))
    except (RuntimeError, NotImplementedError):
        return store
    return mine


def holder(store: Store, size: int) -> str:
    """Which rank takes the store along when it ends, for people; empty where none does, or nobody knows.

    Args:
        store: of a group.
        size: ranks of the group, whose numbers are not those of all ranks where it is smaller.
    """
    elsewhere = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if elsewhere or type(_bare(store)).__name__ != "TCPStore":
        return ""
    return "rank 0" if not dist.is_initialized() or dist.get_world_size() == size else "rank 0 of all ranks"


def told_lost(store: Store, size: int, error: BaseException) -> str:
    """That a store cannot be asked, a sentence without an end; arguments as for ``holder``."""
    who = holder(store, size)
    which = f"the store, which {who} holds," if who else "the store"
    return f"{which} {'does not answer' if isinstance(error, TimeoutError) else 'is gone'}"


def is_held_here(store: Store) -> bool:
    """Whether the store may end with this process."""
    return bool(holder(store, 0)) and dist.is_initialized() and dist.get_rank() == 0


def _bare(store: Store) -> Store:
    while isinstance(store, PrefixStore):
        store = store.underlying_store
    return store


def peek(store: Store, key: str) -> bytes | None:
    """What is there, at once: a store's ``get`` waits first, which is one round trip more."""
    go_on()
    found = store.compare_set(key, _NOTHING, _NOTHING)
    return None if found == _NOTHING.encode() else found


def wait_for(store: Store, keys: Sequence[str], seconds: float) -> bool:
    """Wait until all keys are there; whether they are. Meanwhile others may ask over the same connection."""
    began = time.monotonic()
    while keys:
        go_on()
        waited = time.monotonic() - began  # before the look: a process that was stopped looks once more
        if store.check(list(keys)):
            break
        if waited > seconds:
            return False
        # The longer it has waited the more seldom it asks: a store may have a thousand ranks to answer.
        _is_over.wait(min(max(_SHORTEST, _SHARE * waited), _LONGEST))
    return True


def go_on() -> None:
    """Called by what asks again and again.

    Raises:
        RuntimeError: if the interpreter ends.
    """
    if _is_over.is_set():
        raise RuntimeError("the interpreter ends")


def _let_them_return() -> None:
    """Wait a moment for the errands; those that are left do nothing more."""
    end = time.monotonic() + _RETURNS_WITHIN
    for thread in list(_threads):
        thread.join(max(0.0, end - time.monotonic()))
    _is_over.set()
    end = time.monotonic() + _RETURNS_WITHIN
    while (left := [thread.native_id or 0 for thread in _threads if thread.is_alive()]) and time.monotonic() < end:
        if are_at_rest(left, _RESTS):
            freeze(left)
            return


atexit.register(to_its_end, _let_them_return)
