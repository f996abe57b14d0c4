"""What can end a step, turned into the one error that training sees."""

from __future__ import annotations

from typing import TYPE_CHECKING

from commhub._errors import HookError, HookTimeoutError, described

if TYPE_CHECKING:
    from commhub.protocol._bucket import Bucket


class Stopped(Exception):  # noqa: N818 - it is no error: the interpreter is exiting
    """The driver is being closed while a step is under way."""


def own_error(label: str, bucket: Bucket, error: BaseException) -> HookError:
    """The error of this rank's hook in this bucket, its cause attached."""
    where = f"{label}, bucket {bucket.index}, step {bucket.step}, rank {bucket.rank}"
    told = described(error)
    if isinstance(error, HookError):
        kind = HookTimeoutError if isinstance(error, HookTimeoutError) else HookError
        made: HookError = kind(f"{where}: {told.partition(': ')[2]}")
    else:
        made = HookError(f"{where}: the hook raised {told}")
    made.__cause__ = error
    return made


def peer_error(label: str, bucket: Bucket, told: str, cause: BaseException | None = None) -> HookError:
    """What happened to another rank, as this rank reports it."""
    made = HookError(f"{label}, bucket {bucket.index}, step {bucket.step}, rank {bucket.rank}: {told}")
    made.__cause__ = cause
    return made


def is_lost_connection(error: BaseException) -> bool:
    """Whether Gloo reports that a peer is gone or silent, which is seldom the first cause."""
    text = described(error).lower()
    return (
        isinstance(error, RuntimeError)
        and not isinstance(error, HookError)
        and ("gloo" in text or "connection" in text)
    )


def to_raise(failure: HookError) -> HookError:
    """A copy: the traceback of the one that the driver keeps would keep the caller's frames alive, and the model."""
    copy = type(failure)(*failure.args)
    copy.__cause__ = failure.__cause__
    return copy
