"""C++ of a plugin's own, for work that no chain of tensor operations does at the speed of memory."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from ._kernels import _compiling, wants_compiling

if TYPE_CHECKING:
    from ctypes import CDLL

logger = logging.getLogger("commhub")


def cpp_library(source: str, *, name: str, elements: int) -> CDLL | None:
    """The functions that ``source`` exports, compiled for this host; ``None`` where that is not wanted or not possible.

    Whoever calls this does the same work with tensor operations where there is no library. Call it in ``prepare``, so
    that no step waits for it; and try ``Kernel`` first, which needs no second form of the work.

    PyTorch's compiler driver is used, as by ``torch.compile`` on the host: with its flags, for this machine's
    instruction set, with OpenMP, once per machine and source (in ``TORCHINDUCTOR_CACHE_DIR``).

    Args:
        source: C++20, with functions declared ``extern "C"``; they are called without the interpreter's lock.
        name: what it is, for the log.
        elements: how many elements a training step puts through it. It is compiled from 2^20 on;
            ``COMMHUB_COMPILE=0`` in the environment means never, ``COMMHUB_COMPILE=1`` always. Where there is no
            compiler, a line in the log says so.
    """
    if not wants_compiling(elements):
        return None
    try:
        from torch._inductor.codecache import CppCodeCache

        with _compiling:
            made: CDLL = CppCodeCache.load(source)
    except Exception as err:  # noqa: BLE001 - a compiler can fail in any way, and none of them matters here
        reason = " ".join(str(err).split())[:300]
        logger.warning("%s runs uncompiled: %s: %s", name, type(err).__name__, reason)
        return None
    return made
