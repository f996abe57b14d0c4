"""One bench from settings to exit code: as the process that starts the ranks, or as a rank of torchrun."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from typing import TYPE_CHECKING

from ._board import Board
from ._check import checked
from ._display import default_progress
from ._finish import finish
from ._launch import launch
from ._options import BenchError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType

    from ._options import Settings

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(BaseException):
    """The user, or a supervisor, wants the bench to end now."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.code = 128 + signum


def run(settings: Settings) -> int:
    """Run the bench and print its table.

    Where torchrun has set RANK and WORLD_SIZE, this process is one of its ranks; otherwise it starts
    ``settings.ranks`` of them. Files are written as the settings say, also after Ctrl-C.

    Returns:
        The exit code: 0, 1 where a hook failed, 130 after Ctrl-C.

    Raises:
        BenchError: if the settings cannot work, for example for an unknown hook or a missing file.
    """
    world_size = os.environ.get("WORLD_SIZE") if "RANK" in os.environ else None
    command = settings.command
    if world_size is not None:
        from ._torchrun import run_as_rank

        if settings.hosts > 1:
            raise BenchError("--hosts makes hosts on one machine, and torchrun has started ranks already: leave it out")
        return run_as_rank(checked(settings, world_size=int(world_size)), command)
    board, code = None, 0
    try:
        with _stoppable():
            settings = checked(settings, world_size=settings.ranks)
            board = Board(settings, command, default_progress())
            # Importing torch in every process takes a few seconds.
            print(f"starting {settings.ranks} rank{'s' if settings.ranks > 1 else ''}", file=sys.stderr, flush=True)
            launch(settings, board)
    except Stopped as stop:
        code = stop.code
    finally:
        if board is not None:
            board.close()
    return code if board is None else finish(board.outcome(), stopped=code)


@contextlib.contextmanager
def _stoppable() -> Iterator[None]:
    """Turn the first Ctrl-C or SIGTERM into ``Stopped``, and let nothing disturb the clean-up it starts."""

    def stop(signum: int, _frame: FrameType | None) -> None:
        for each in _SIGNALS:
            signal.signal(each, signal.SIG_IGN)
        raise Stopped(signum)

    # A job that a shell started in the background ignores SIGINT, and shall.
    before = {each: handler for each in _SIGNALS if (handler := signal.getsignal(each)) != signal.SIG_IGN}
    for each in before:
        signal.signal(each, stop)
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
