"""One live line per hook, drawn by rich. Imported only where rich is there and the output is a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from ._format import printable
from ._progress import TIMING, headline, measured

if TYPE_CHECKING:
    from rich.progress import TaskID

    from ._options import Settings
    from ._results import StepRecord


class LiveProgress:
    """A bar per hook with the figures of its latest step."""

    def __init__(self, stream: TextIO) -> None:
        self._console = Console(file=stream, highlight=False)
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}", markup=False),
            console=self._console,
        )
        self._steps = self._repeats = 0
        self._width = 0
        self._sent = 0.0
        self._task: TaskID | None = None

    def begin(self, settings: Settings, setup: dict[str, Any], link: str) -> None:
        """Say what is trained and where, and start drawing."""
        self._steps, self._repeats = settings.steps, settings.repeats
        self._width = max(map(len, settings.hooks))
        text = printable(headline(settings, setup, link), self._console.file)
        self._console.print(text, markup=False, soft_wrap=True)
        self._progress.start()

    def start(self, hook: str) -> None:
        """A new line."""
        self._sent = 0.0
        self._task = self._progress.add_task(
            printable(hook, self._console.file).ljust(self._width), total=self._steps, figures=""
        )

    def step(self, record: StepRecord) -> None:
        """The line's new figures."""
        self._sent += record.sent_bytes
        if self._task is not None:
            self._progress.update(self._task, completed=record.step + 1, figures=measured(record, self._sent))

    def start_timing(self, hooks: int) -> None:
        """A line for all of them."""
        self._task = self._progress.add_task(TIMING.ljust(self._width), total=hooks * self._repeats, figures="")

    def timed(self) -> None:
        """One more."""
        if self._task is not None:
            self._progress.advance(self._task)

    def end(self, text: str) -> None:
        """Only what went wrong is news."""
        if self._task is not None and text != "done":
            self._progress.update(self._task, figures=printable(text, self._console.file))

    def close(self) -> None:
        """Leave the last state on the screen and give the cursor back."""
        self._progress.stop()
