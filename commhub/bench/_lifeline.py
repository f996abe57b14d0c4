"""Ranks that end with the process that started them, whatever ended it.

The starter holds the writing end of a named pipe; every rank has a thread that waits for its end of file.
Nothing else reaches all ranks at once: torch's launcher puts them in sessions of their own, a killed starter
sends no signal, and a rank that waits for its peers in C++ handles none.
"""

from __future__ import annotations

import contextlib
import os
import select
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_NAME = "lifeline"
ENDED = 130
"""The exit code of a rank whose starter is gone."""


@contextlib.contextmanager
def lifeline(folder: Path) -> Iterator[None]:
    """Keep the ranks that watch `folder` alive inside this context and end them with it."""
    path = folder / _NAME
    if not hasattr(os, "mkfifo"):  # Windows; there the launcher's own signals have to do
        yield
        return
    os.mkfifo(path)
    # Read and write: opening a pipe for writing alone would wait for the first reader.
    descriptor = os.open(path, os.O_RDWR)
    try:
        yield
    finally:
        os.close(descriptor)
        path.unlink()


def die_with(folder: Path) -> None:
    """End this process as soon as the context that `lifeline` opened on `folder` is over."""
    if hasattr(os, "mkfifo"):
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
