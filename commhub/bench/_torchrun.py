"""Be one rank of a torchrun that the user started, on one machine or on many."""

from __future__ import annotations

import os
import signal
import sys
import threading
from typing import TYPE_CHECKING, Any

from ._board import Board
from ._display import default_progress
from ._finish import finish
from ._format import printable
from ._rank import run_rank

if TYPE_CHECKING:
    from ._options import Settings


def run_as_rank(settings: Settings, command: str) -> int:
    """Train as the rank that the environment names; rank 0 shows and writes what was measured."""
    indexes = range(len(settings.hooks))
    if os.environ["RANK"] != "0":
        return 0 if run_rank(settings, indexes, _complain, go_on=True) else 1
    board = Board(settings, command, default_progress())
    _keep_when_stopped(board)
    run_rank(settings, indexes, board.on_event, go_on=True)
    board.close()
    if board.fatal is not None:
        print(printable(f"commhub bench: {board.fatal}", sys.stderr), file=sys.stderr)
        return 2
    return finish(board.outcome(), stopped=0)


def _complain(event: dict[str, Any]) -> None:
    """A machine may lack a file or a GPU that rank 0 has."""
    if event["kind"] == "fatal":
        print(printable(f"commhub bench: rank {os.environ['RANK']}: {event['error']}", sys.stderr), file=sys.stderr)


def _keep_when_stopped(board: Board) -> None:
    """Write what was measured when torchrun is stopped.

    A thread does it, woken from C: the main thread may be waiting in C++ for peers that are already gone, and
    would run a Python handler too late.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer)
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, lambda _signum, _frame: None)

    def keep() -> None:
        signum = os.read(reader, 1)[0]
        board.close()
        os._exit(finish(board.outcome(), stopped=128 + signum))

    threading.Thread(target=keep, name="keep-when-stopped", daemon=True).start()
