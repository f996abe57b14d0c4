"""Show a bench while it runs: a live line per hook with rich on a terminal, else a few plain lines each."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, Protocol, TextIO

from commhub.bench import _format

from ._sizes import SIZES

if TYPE_CHECKING:
    from ._options import Settings
    from ._results import StepRecord

_LINES_PER_HOOK = 5


class Progress(Protocol):
    """What a bench tells while it runs."""

    def begin(self, settings: Settings, setup: dict[str, Any]) -> None:
        """The ranks are up and said what they found."""

    def start(self, hook: str) -> None:
        """Training under `hook` begins."""

    def step(self, record: StepRecord) -> None:
        """A step is over."""

    def end(self, text: str) -> None:
        """The hook that was started is over; `text` says how."""

    def close(self) -> None:
        """Nothing more comes; leave the terminal as it was."""


def make_progress(stream: TextIO) -> Progress:
    """Rich's live display if `stream` is a terminal and rich is installed, else plain lines."""
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
        self._sent = 0.0

    def begin(self, settings: Settings, setup: dict[str, Any]) -> None:
        """Say what is trained and where."""
        self._steps = settings.steps
        self._print(headline(settings, setup))

    def start(self, hook: str) -> None:
        """Remember the hook for the lines to come."""
        self._hook, self._sent = hook, 0.0

    def step(self, record: StepRecord) -> None:
        """Print every so often."""
        self._sent += record.sent_bytes
        done = record.step + 1
        if done * _LINES_PER_HOOK // self._steps > record.step * _LINES_PER_HOOK // self._steps:
            self._print(f"{self._hook}  step {done}/{self._steps}  {measured(record, self._sent)}")

    def end(self, text: str) -> None:
        """Only what went wrong is news."""
        if text != "done":
            self._print(f"{self._hook}  {text}")

    def close(self) -> None:
        """Nothing to restore."""

    def _print(self, text: str) -> None:
        print(text, file=self._stream, flush=True)


def measured(record: StepRecord, sent_bytes: float) -> str:
    """The figures of a progress line."""
    seconds, sent = _format.seconds(record.seconds), _format.size(sent_bytes)
    return f"loss {_format.loss(record.loss)}  {seconds}/step  sent {sent}"


def headline(settings: Settings, setup: dict[str, Any]) -> str:
    """What is trained, on what, and whether the link is real."""
    size = SIZES[settings.model]
    text = settings.data or "Python's standard library"
    link = f"emulated: {settings.link}" if settings.emulated else "as it is"
    threads = f"{setup['threads']} thread{'s' if setup['threads'] > 1 else ''} each"
    return (
        f"{settings.model} transformer, {_format.count(setup['parameters'])} parameters; "
        f"{text}, {_format.size(setup['text_bytes'])}\n"
        f"{setup['world_size']} ranks on {setup['device']} ({setup['backend']}, {threads}); "
        f"{settings.batch} x {size.context} bytes per rank and step, {settings.optimizer}; link {link}"
    )


def default_progress() -> Progress:
    """Progress goes to stderr, so that the table on stdout can be piped."""
    return make_progress(sys.stderr)
