"""What other threads of this process are doing, as the operating system tells it; what is done for them at exit."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

_TASKS = Path("/proc/self/task")


def to_its_end(function: Callable[[], None]) -> None:
    """Do what the interpreter must not end without: where another Ctrl-C ends the function early, it begins anew.

    Args:
        function: may be called again, and takes a few seconds at most.
    """
    is_over = False
    while not is_over:
        with contextlib.suppress(KeyboardInterrupt, SystemExit):  # which a handler of a signal raises
            function()
            is_over = True


def are_at_rest(which: str | Collection[int | None], seconds: float) -> bool:
    """Whether all threads of this name, or with these numbers, sleep, and have not run for so many seconds.

    Waits that long to see it.

    Where the operating system does not tell, a second is waited instead.
    """
    if not _TASKS.exists():
        time.sleep(1.0)
        return True
    before = _running_times(which)
    time.sleep(seconds)
    return before is not None and before == _running_times(which)


def _running_times(which: str | Collection[int | None]) -> dict[str, str] | None:
    """How long each of the threads has run, in the kernel's own words; ``None`` if one runs now."""
    times = {}
    for task in _TASKS.iterdir():
        with contextlib.suppress(OSError):  # it has just ended
            chosen = (task / "comm").read_text().strip() == which if isinstance(which, str) else int(task.name) in which
            if not chosen:
                continue
            state, *figures = (task / "stat").read_text().rpartition(")")[2].split()
            if state != "S":
                return None
            exact = task / "schedstat"  # in nanoseconds; the figures in "stat" are hundredths of a second
            times[task.name] = exact.read_text().split()[0] if exact.exists() else " ".join(figures[10:12])
    return times
