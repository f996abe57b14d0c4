"""Gather events into results while a bench runs: at any moment what was measured can be shown and kept."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs

from ._hooks import in_steady_state
from ._machine import describe_machine
from ._results import HookResult, Outcome, StepRecord

if TYPE_CHECKING:
    from ._options import Settings
    from ._progress import Progress


class Board:
    """The bench's state as its events tell it."""

    def __init__(self, settings: Settings, command: str, progress: Progress) -> None:
        self.settings = settings
        self.setup: dict[str, Any] = {}
        self.fatal: str | None = None
        self._command = command
        self._progress = progress
        self._records: list[list[StepRecord]] = [[] for _ in settings.hooks]
        self._results = [
            HookResult(hook=hook, ran_as=in_steady_state(hook), status="not run", warmup=settings.warmup)
            for hook in settings.hooks
        ]

    def on_event(self, event: dict[str, Any]) -> None:
        """Take in one event of rank 0, in the order in which they happened."""
        kind = event["kind"]
        if kind == "setup":
            first = not self.setup
            self.setup = {key: value for key, value in event.items() if key != "kind"}
            if first:
                self._progress.begin(self.settings, self.setup)
            return
        if kind == "fatal":
            self.fatal = event["error"]
            return
        index = event["index"]
        if kind == "step":
            self._records[index].append(StepRecord(**event["record"]))
            self._progress.step(self._records[index][-1])
            return
        if kind == "start":
            self._change(index, status="interrupted")
            self._progress.start(self._results[index].hook)
        elif kind == "done":
            self._change(index, status="done", validation_loss=event["validation_loss"])
            self._progress.end("done")
        elif kind == "failed":
            self._change(index, status="failed", error=event["error"])
            self._progress.end(f"failed: {event['error']}")

    def pending(self) -> list[int]:
        """The hooks that have not been started."""
        return [index for index, result in enumerate(self._results) if result.status == "not run"]

    def running(self) -> int | None:
        """The hook that was started and has neither finished nor failed."""
        return next((i for i, result in enumerate(self._results) if result.status == "interrupted"), None)

    def outcome(self) -> Outcome:
        """What was measured so far; a hook under way counts as interrupted."""
        return Outcome(
            settings=self.settings.as_dict(),
            command=self._command,
            machine=describe_machine(),
            setup=self.setup,
            link=self.settings.link,
            results=tuple(
                attrs.evolve(result, records=tuple(records))
                for result, records in zip(self._results, self._records, strict=True)
            ),
        )

    def close(self) -> None:
        """Show no more progress."""
        self._progress.close()

    def _change(self, index: int, **changes: Any) -> None:
        self._results[index] = attrs.evolve(self._results[index], **changes)
