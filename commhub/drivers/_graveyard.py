"""Closed groups with a collective that has not ended: to destroy one would block, so each is kept until it has.

A thread looks after them, as long as there are any; it is joined at exit, when what is left is the operating system's.
"""

from __future__ import annotations

import contextlib
import os
import threading
from typing import Protocol

_EVERY = 0.25
"""Seconds between looks whether a collective has ended."""
_JOINS_WITHIN = 2.0
"""Seconds in which the thread that frees a group has done so; it takes some milliseconds."""


class Buried(Protocol):
    """Groups that were given up."""

    def is_idle(self) -> bool:
        """Whether all of their collectives have ended."""

    def free(self) -> None:
        """Destroy them, when they are idle."""

    def abandon(self) -> None:
        """Never destroy them."""


_lock = threading.Lock()
_kept: list[Buried] = []
_keeper: threading.Thread | None = None
_ends = threading.Event()


def bury(closed: Buried) -> None:
    """Free groups now, or as soon as their collectives have ended; nothing blocks."""
    global _keeper
    with _lock:
        if closed not in _kept:
            _kept.append(closed)
    sweep()
    with _lock, contextlib.suppress(RuntimeError):  # no thread begins any more
        if _kept and _keeper is None and not _ends.is_set():
            _keeper = threading.Thread(target=_keep, name="commhub-keeper", daemon=True)
            _keeper.start()


def sweep() -> None:
    """Free the groups whose collectives have ended."""
    with _lock:  # of two threads that free one, the other would find it gone
        idle = [one for one in _kept if one.is_idle()]
        _kept[:] = [one for one in _kept if one not in idle]
    for one in idle:
        one.free()


def close_all() -> None:
    """At exit: free what can be freed, and leave the others to the operating system."""
    _ends.set()
    keeper = _keeper
    if keeper is not None:
        keeper.join(_JOINS_WITHIN)  # the interpreter must not end while Gloo's destructor runs
    sweep()
    _abandon_all()


def _keep() -> None:
    global _keeper
    while not _ends.wait(_EVERY):
        sweep()
        with _lock:
            if not _kept:
                _keeper = None
                return


def _abandon_all() -> None:
    for one in _kept:
        one.abandon()
    _kept.clear()


def _begin_in_child() -> None:
    """In a forked child the groups' threads are not there, nor is this module's, which may have held its locks."""
    global _lock, _keeper, _ends
    _lock, _keeper, _ends = threading.Lock(), None, threading.Event()
    _abandon_all()


os.register_at_fork(after_in_child=_begin_in_child)
