"""What came of a call on several ranks, as values: results, failures, and the one error that tells all."""

import os
import signal
import traceback
from types import TracebackType
from typing import Any, NamedTuple

import attrs

from commhub._printable import message_of, shortened, type_name

_HERE = os.path.dirname(__file__)
MOST = 256
"""Ranks that one machine plays at most."""
_TAIL = 6000  # characters of a rank's output that an error shows


class RankFailure(NamedTuple):
    """Why a rank failed: an exception's type, message and traceback, or how its process died or hung."""

    type_name: str
    message: str
    traceback: str

    @classmethod
    def of(cls, error: BaseException) -> "RankFailure":
        """The failure that ``error`` is, its traceback without this harness's own frames."""
        shown = error.with_traceback(_users(error.__traceback__))
        return cls(type_name(error), message_of(error), shortened("".join(traceback.format_exception(shown))))


def _users(trace: TracebackType | None) -> TracebackType | None:
    start = trace
    while trace is not None:
        if os.path.dirname(trace.tb_frame.f_code.co_filename) != _HERE:
            return trace
        trace = trace.tb_next
    return start


def death(status: int) -> RankFailure:
    """The failure of a process that ended with ``status`` (negative: the signal that ended it)."""
    name = signal.Signals(-status).name if status < 0 else f"exit {status}"
    how = f"killed by {name}" if status < 0 else f"exited with code {status}"
    return RankFailure(name, f"the process was {how}" if status < 0 else f"the process {how}", "")


@attrs.frozen(kw_only=True)
class RankResult:
    """What one brand-new process did: ``run_fresh`` returns one per rank."""

    value: Any = None
    """What the function returned; ``None`` where it did not return."""
    error: RankFailure | None = None
    """The exception that left the function, a hang, or else an exit that was not 0."""
    exitcode: int = 0
    """As in ``subprocess``: negative for a signal."""
    stderr: str = ""
    """What the process wrote to stderr, and to stdout in between."""


class RankError(AssertionError):
    """A call failed on one rank or more; the text holds every failing rank's traceback and output."""

    def __init__(
        self,
        call: str,
        errors: dict[int, RankFailure],
        stacks: dict[int, str],
        outputs: dict[int, str],
        world_size: int,
    ) -> None:
        self.errors = errors
        """rank -> (type name, message, traceback), for each rank that failed."""
        self.stacks = stacks
        """rank -> the Python stacks of each rank that was still running, and was killed."""
        self.outputs = outputs
        """rank -> what it wrote to stdout and stderr."""
        lines = [f"{call} failed on {len(errors)} of {world_size} ranks"]
        for rank, failure in sorted(errors.items()):
            first_line = failure.message.partition("\n")[0]
            lines.append(f"rank {rank}: {failure.type_name}: {first_line}")
        for rank in range(world_size):
            if rank in errors and errors[rank].traceback:
                lines.append(f"\n---- rank {rank}, traceback\n{errors[rank].traceback.rstrip()}")
            if rank in stacks:
                lines.append(f"\n---- rank {rank}, still running when it was killed\n{stacks[rank].rstrip()}")
            if (rank in errors or rank in stacks) and outputs.get(rank, "").strip():
                lines.append(f"\n---- rank {rank}, output\n{outputs[rank].rstrip()[-_TAIL:]}")
        super().__init__("\n".join(lines))
