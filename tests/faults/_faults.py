"""What goes wrong on one rank, the victim: a fault strikes where the phase has its place, or hits a collective.

To add one: a function, a line in FAULTS, and a row of the table in ``test_matrix``.
"""

from __future__ import annotations

import os
import resource
import signal
import time
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import torch

from commhub.testing import current
from commhub.testing._faults import Corrupt, Failed, Late, Lost

if TYPE_CHECKING:
    from collections.abc import Callable

    from ._here import Here

TIMEOUT = 2.0
"""Seconds that ranks wait for one another where the fault strikes."""
LONGER = TIMEOUT + 1.5
SLEEPS = TIMEOUT + 5.0
"""Seconds that a collective of Gloo's may sleep that was given up, where ranks are registered with TIMEOUT."""


@attrs.frozen(kw_only=True)
class Fault:
    """What goes wrong.

    Attributes:
        strike: called in the victim's code with the value that is about to be used there; returns the one that is.
        link: what happens to a collective of the victim's instead.
        words: what errors must say of the cause, as a pattern.
        kills: whether the victim is gone after it.
        stops: whether the whole process is, until the others have ended.
        ends_the_store: whether the group's store is.
        symmetric: whether nobody can tell who of two ranks is wrong: errors then name both.
    """

    words: str = ""
    strike: Callable[[Here, Any], Any] | None = None
    link: Any = None
    kills: bool = False
    stops: bool = False
    ends_the_store: bool = False
    symmetric: bool = False


def raises(here: Here, value: Any) -> Any:
    raise ZeroDivisionError("planned")


def raises_base(here: Here, value: Any) -> Any:
    raise SystemExit("planned")


def is_stuck(here: Here, value: Any) -> Any:
    """Not return before everybody has ended."""
    current().connect("user").wait(["all have ended"], timedelta(seconds=30))
    return value


def is_killed(here: Here, value: Any) -> Any:
    os.kill(os.getpid(), signal.SIGKILL)


def is_stopped(here: Here, value: Any) -> Any:
    """All threads stop at once, and go on when all others have ended: see ``Here.ended``."""
    os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(0.01)  # the signal may find another thread first
    return value


def is_late(here: Here, value: Any) -> Any:
    time.sleep(LONGER)
    return value


def is_other(here: Here, value: Any) -> Any:
    """Something of another size than the other ranks have: a tensor, groups of ranks, a file."""
    if isinstance(value, torch.Tensor):
        return torch.cat([value, value[:3]])
    if isinstance(value, list):
        return [[rank] for group in value for rank in group]
    if isinstance(value, Path):
        (file,) = value.glob(f"commhub-rank{here.rank}-*.pt")
        os.truncate(file, 100)
    return value  # ``Here.hook`` differs


def loses_the_store(here: Here, value: Any) -> Any:
    os.kill(here.keeper, signal.SIGKILL)
    time.sleep(0.05)
    return value


def fills_the_disk(here: Here, value: Any) -> Any:
    """No file grows above some bytes from now on."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
    return value


SILENT = r"did not come|has not returned|did not end within|(does|did) not answer|given up"
BEHIND = r"is behind: it waits for AllReduce (\d of bucket \d|of commhub's own) in .*, which has ended on rank"

FAULTS = {
    "raise": Fault(strike=raises, words="ZeroDivisionError: planned"),
    "BaseException": Fault(strike=raises_base, words="SystemExit: planned"),
    "stuck": Fault(strike=is_stuck, words=SILENT),
    "killed": Fault(strike=is_killed, words=r"did not come|is gone|has ended|[Cc]onnection|was lost", kills=True),
    "stopped": Fault(strike=is_stopped, words=SILENT, stops=True),
    "late": Fault(strike=is_late, words=SILENT),
    "wrong sizes": Fault(strike=is_other, words=r"bf16|\d+ float32|\d+ bytes|partition", symmetric=True),
    "lost store": Fault(strike=loses_the_store, words=r"\bstore\b", ends_the_store=True),
    "full disk": Fault(strike=fills_the_disk, words="File too large"),
    "link: lost": Fault(link=Lost(), words=BEHIND),
    "link: corrupt": Fault(link=Corrupt(byte=2, bits=0x80)),
    "link: failed": Fault(link=Failed("the cable was cut"), words="the cable was cut"),
    "link: late": Fault(link=Late(LONGER), words=BEHIND),
}
