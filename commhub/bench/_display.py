"""Show a bench while it runs: a live line per hook with rich on a terminal, else a few plain lines each."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, TextIO

from ._format import printable
from ._progress import TIMING, headline, measured

if TYPE_CHECKING:
    from ._options import Settings
    from ._progress import Progress
    from ._results import StepRecord

_LINES_PER_HOOK = 5


def default_progress() -> Progress:
    """Progress goes to stderr, so that the table on stdout can be piped."""
    return make_progress(sys.stderr)


def make_progress(stream: TextIO) -> Progress:
    """Rich's live display if ``stream`` is a terminal and rich is installed, else plain lines."""
    if stream.isatty():
        try:
            from ._live import LiveProgress
        except ImportError:
            pass
        else:
            return LiveProgress(stream)
    return PlainProgress(stream)


class PlainProgress:
    """A line when a hook starts, a few while it trains, one when it ends."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._steps = 0
        self._hook = ""
        self._repeats = self._timed = self._to_time = 0
        self._sent = 0.0

    def begin(self, settings: Settings, setup: dict[str, Any], link: str) -> None:
        """Say what is trained and where."""
        self._steps, self._repeats = settings.steps, settings.repeats
        self._print(headline(settings, setup, link))

    def start(self, hook: str) -> None:
        """Remember the hook for the lines to come."""
        self._hook, self._sent = hook, 0.0

    def step(self, record: StepRecord) -> None:
        """Print every so often."""
        self._sent += record.sent_bytes
        done = record.step + 1
        if done * _LINES_PER_HOOK // self._steps > record.step * _LINES_PER_HOOK // self._steps:
            self._print(f"{self._hook}  step {done}/{self._steps}  {measured(record, self._sent)}")

    def start_timing(self, hooks: int) -> None:
        """Say what happens now."""
        self._hook, self._timed, self._to_time = TIMING, 0, hooks * self._repeats
        self._print(f"{TIMING}: {self._repeats} of each of {hooks} hooks, in shuffled order")

    def timed(self) -> None:
        """Print every so often."""
        self._timed += 1
        if self._timed * _LINES_PER_HOOK // self._to_time > (self._timed - 1) * _LINES_PER_HOOK // self._to_time:
            self._print(f"{TIMING}  {min(self._timed, self._to_time)}/{self._to_time}")

    def end(self, text: str) -> None:
        """Only what went wrong is news."""
        if text != "done":
            self._print(f"{self._hook}  {text}")

    def close(self) -> None:
        """Nothing to restore."""

    def _print(self, text: str) -> None:
        print(printable(text, self._stream), file=self._stream, flush=True)
