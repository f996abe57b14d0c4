"""Stores that may never answer, because their machine is gone for instance: who asks them waits only so long."""

from __future__ import annotations

import atexit
import os
import socket
import threading
import time
import weakref
from datetime import timedelta
from typing import TYPE_CHECKING, Generic, TypeVar

import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore

from ._deaf import deafen
from ._threads import are_at_rest, to_its_end

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch.distributed.distributed_c10d import Store

T = TypeVar("T")

_NOTHING = "nothing"  # is never stored; it is the answer where nothing is
_TRIES = 3
_CONNECTS_WITHIN = 0.5
"""Seconds in which a store is connected to, or another try begins."""

_SLICE = 0.25
"""Seconds of an uninterrupted wait."""
_RETURNS_WITHIN = 1.0
"""Seconds that an errand has at exit before it gets no answer any more, and again to come to rest after that."""
_RESTS = 0.06
"""Seconds in which who goes on at all would have run; nobody pauses for longer between two questions."""

_threads: weakref.WeakSet[threading.Thread] = weakref.WeakSet()
_places: dict[tuple[str, int], Errand[set[str]]] = {}
"""The hosts and ports of the stores that were connected to, and the hosts' addresses."""
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
    _note(store)
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
    """Wait until all keys are there; whether they are."""
    end = time.monotonic() + seconds
    while keys:
        go_on()
        left = max(end - time.monotonic(), 0.01)
        try:
            store.wait(list(keys), timedelta(seconds=min(left, _SLICE)))
        except RuntimeError as error:
            if "wait timeout" not in str(error).lower():  # a lost connection, for instance
                raise
        else:
            break
        if left <= _SLICE:
            return bool(store.check(list(keys)))  # this process may not have run for most of that time
    return True


def go_on() -> None:
    """Called by what asks again and again.

    Raises:
        RuntimeError: if the interpreter ends.
    """
    if _is_over.is_set():
        raise RuntimeError("the interpreter ends")


def _note(store: Store) -> None:
    """Remember where a store is."""
    bare = _bare(store)
    place = str(getattr(bare, "host", "")), int(getattr(bare, "port", 0))
    if place[1] and place not in _places:
        _places[place] = Errand(lambda: {str(found[4][0]) for found in socket.getaddrinfo(*place)})


def _let_them_return() -> None:
    """Wait a moment for the errands; those that are left get no answer any more.

    A thread that returns from torch's C++ while the interpreter ends aborts the process: Python ends the thread there,
    which destructors of C++ do not allow.
    """
    end = time.monotonic() + _RETURNS_WITHIN
    for thread in list(_threads):
        thread.join(max(0.0, end - time.monotonic()))
    _is_over.set()
    left = {thread.native_id for thread in _threads if thread.is_alive()}
    if left:
        deafen({(each, port) for (_, port), found in _places.items() if found.wait(0.0) for each in found.result()})
    end = time.monotonic() + _RETURNS_WITHIN
    while left and not are_at_rest(left, _RESTS) and time.monotonic() < end:
        pass


atexit.register(to_its_end, _let_them_return)
