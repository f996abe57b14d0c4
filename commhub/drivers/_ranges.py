"""Ranges in the traces of ``torch.profiler``: which hook works on which bucket, and what is waited for.

A profiler records the thread that started it and those which inherit its state, and a thread of Python's cannot: the
communication thread is in the trace where the profiler was told to record all threads. Nothing is named and nothing
entered while no profiler is on.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Literal

from torch.autograd import profiler

if TYPE_CHECKING:
    from ._records import BucketRecord

_NOTHING = contextlib.nullcontext()


def is_on() -> bool:
    """Whether a profiler is on in any thread."""
    return profiler._is_profiler_enabled  # 16 ns; ``_profiler_enabled()`` knows the calling thread alone


def of(
    record: BucketRecord | None, phase: Literal["encode", "wait", "decode"]
) -> contextlib.AbstractContextManager[object]:
    """A range such as ``commhub::powersgd::bucket3::encode`` around what is done for a bucket."""
    if record is None or not is_on():
        return _NOTHING
    bucket = "word" if record.purpose == "word" else f"bucket{record.index}"
    return profiler.record_function(f"commhub::{record.hook}::{bucket}::{phase}")


def blocked(hook: str) -> contextlib.AbstractContextManager[object]:
    """A range such as ``commhub::powersgd::blocked`` around what training stands still for."""
    return profiler.record_function(f"commhub::{hook}::blocked") if is_on() else _NOTHING
