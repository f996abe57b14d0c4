"""Stores that may never answer, because their machine is gone for instance: who asks them waits only so long."""

from __future__ import annotations

import atexit
import threading
import time
import weakref
from datetime import timedelta
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch.distributed.distributed_c10d import Store

T = TypeVar("T")

_threads: weakref.WeakSet[threading.Thread] = weakref.WeakSet()


class Errand(Generic[T]):
    """``function()`` in a thread of its own, begun at once. A thread that never returns ends with the process."""

    def __init__(self, function: Callable[[], T]) -> None:
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
    """The store through a connection of its own where it has such a thing, so that nobody's wait blocks a look."""
    try:
        mine: Store = store.clone()  # type: ignore[attr-defined]  # missing from the stub
        mine.set_timeout(timedelta(seconds=seconds))
    except (RuntimeError, NotImplementedError):
        return store
    return mine


@atexit.register
def _let_them_return() -> None:
    """Wait a moment for the errands: one that returns from C++ after the interpreter's end aborts the process."""
    end = time.monotonic() + 1.0
    for thread in list(_threads):
        thread.join(max(0.0, end - time.monotonic()))
