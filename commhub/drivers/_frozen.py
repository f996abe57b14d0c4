"""Threads that run no more, so that none comes back from torch's C++ while the interpreter ends.

Python (before 3.14) ends such a thread where it asks for the interpreter's lock, which destructors of C++ do not allow:
the process is aborted.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable


class _Action(ctypes.Structure):
    """What to do at a signal, as the C library of Linux lays it out."""

    _fields_ = (
        ("handler", ctypes.c_void_p),
        ("mask", ctypes.c_ubyte * 128),
        ("flags", ctypes.c_int),
        ("restorer", ctypes.c_void_p),
    )


def freeze(threads: Iterable[int]) -> bool:
    """Let these threads, which sleep in the kernel, do nothing more for as long as the process lives.

    Each gets a signal whose handler waits for another one, and lets none in. What a thread holds it keeps: so it must
    be at rest, and not hold what the rest of the process needs.

    Args:
        threads: their numbers, as the operating system has them.

    Returns:
        Whether they are frozen, which only Linux can do.
    """
    library = ctypes.pythonapi  # the C library too; it keeps the interpreter's lock, so that none of them can have it
    if sys.platform != "linux" or not hasattr(library, "tgkill"):
        return False
    number = next((one for one in range(signal.SIGRTMAX, signal.SIGRTMIN, -1) if _is_unused(one)), None)
    if number is None:
        return False
    action = _Action(handler=ctypes.cast(library.pause, ctypes.c_void_p).value)
    library.sigfillset(ctypes.byref(action.mask))
    if library.sigaction(number, ctypes.byref(action), None) != 0:
        return False
    for thread in threads:
        library.tgkill(os.getpid(), thread, number)
    return True


def _is_unused(number: int) -> bool:
    """Whether nothing is done at a signal, by Python or by a library."""
    action = _Action()
    return ctypes.pythonapi.sigaction(number, None, ctypes.byref(action)) == 0 and not action.handler
