"""Ranks that end with the process that started them, whatever ended it.

The starter holds the writing end of a named pipe; every rank has a thread that waits for its end of file.
Nothing else reaches all ranks at once: torch's launcher puts them in sessions of their own, a killed starter
sends no signal, and a rank that waits for its peers in C++ handles none.
"""

from __future__ import annotations

import os
import select
import threading
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from pathlib import Path

ENDED = 130
"""The exit code of a rank whose starter is gone."""

_NAME = "lifeline"
# Windows has no named pipes of this kind; there the launcher's own signals have to do.
_SUPPORTED = hasattr(os, "mkfifo")


class Lifeline:
    """Keeps the ranks that watch ``folder`` alive until it is cut, or this process ends."""

    def __init__(self, folder: Path) -> None:
        self._descriptor: int | None = None
        if _SUPPORTED:
            os.mkfifo(folder / _NAME)
            # Read and write: opening a pipe for writing alone would wait for the first reader.
            self._descriptor = os.open(folder / _NAME, os.O_RDWR)

    def cut(self) -> None:
        """End the ranks; again is allowed."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.cut()


def die_with(folder: Path) -> None:
    """End this process as soon as the lifeline in ``folder`` is cut."""
    if _SUPPORTED:
        threading.Thread(target=_watch, args=(folder / _NAME,), name="lifeline", daemon=True).start()


def _watch(path: Path) -> None:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        # Read first: a pipe that had lost its writer before it was opened is never reported as readable.
        os.read(descriptor, 1)
    except BlockingIOError:
        select.select([descriptor], [], [])
    except OSError:
        pass
    os._exit(ENDED)
