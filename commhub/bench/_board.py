"""Gather events into results while a bench runs: at any moment what was measured can be shown and kept."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs

from ._hooks import in_steady_state, network, sending_nothing
from ._machine import describe_machine
from ._progress import told_link
from ._results import HookResult, Outcome, StepRecord
from ._timing import Timing

if TYPE_CHECKING:
    from ._options import Settings
    from ._progress import Progress


class Board:
    """The bench's state as its events tell it.

    Attributes:
        fatal: why no hook can be run, if that is so.
        ran: the settings that the ranks were given: they emulate what is left of the link.
        hosts: how many were made.
        remarks: what went otherwise than asked for.
        timing: the steps that are timed in turn.
    """

    def __init__(self, settings: Settings, command: str, progress: Progress) -> None:
        self.settings = self.ran = settings
        self.hosts = 0
        self.remarks: list[str] = []
        self.setup: dict[str, Any] = {}
        self.fatal: str | None = None
        self.timing = Timing(progress, is_wanted=settings.repeats > 0)
        self._command = command
        self._progress = progress
        self._records: list[list[StepRecord]] = [[] for _ in settings.hooks]
        self._results = [
            HookResult(hook=hook, ran_as=in_steady_state(hook), status="not run", warmup=settings.warmup)
            for hook in settings.hooks
        ]

    def on_event(self, event: dict[str, Any]) -> None:
        """Take in one event of rank 0, in the order in which they happened."""
        if self.timing.on_event(event):
            self._after_timing(event)
            return
        kind = event["kind"]
        if kind == "setup":
            first = not self.setup
            self.setup = {key: value for key, value in event.items() if key != "kind"}
            if first:
                self._progress.begin(self.settings, self.setup, self._told_link())
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

    def todo(self) -> tuple[list[int], list[int]]:
        """The hooks that have yet to be trained under, and those that are through with it and have yet to be timed."""
        status = [result.status for result in self._results]
        pending = [index for index, word in enumerate(status) if word == "not run"]
        if not self.settings.steps:
            return [], [] if self.timing.is_over else pending
        return pending, [] if self.timing.is_over else [i for i, word in enumerate(status) if word == "done"]

    def running(self) -> int | None:
        """The hook that was started and has neither finished nor failed."""
        return next((i for i, result in enumerate(self._results) if result.status == "interrupted"), None)

    def outcome(self) -> Outcome:
        """What was measured so far; a hook under way counts as interrupted."""
        link, nothing = network(self.settings), sending_nothing()
        return Outcome(
            settings=self.settings.as_dict(),
            command=self._command,
            machine=describe_machine(),
            setup=self.setup,
            link=self.ran.link,
            told_link=self._told_link(),
            results=tuple(
                attrs.evolve(result, records=tuple(records), race=self.timing.of(index))
                for index, (result, records) in enumerate(zip(self._results, self._records, strict=True))
            ),
            hosts=self.hosts,
            bandwidth=None if link is None else link.bandwidth,
            floor=self.timing.floor([result.ran_as for result in self._results], nothing),
            remarks=tuple(self.remarks),
            trace=self.timing.trace,
        )

    def close(self) -> None:
        """Show no more progress."""
        self._progress.close()

    def _told_link(self) -> str:
        return told_link(self.settings, self.ran, self.hosts)

    def _after_timing(self, event: dict[str, Any]) -> None:
        """Where nothing was trained, what became of a hook is told by its timing."""
        index = event.get("index", -1)
        if event["kind"] == "dropped" and index >= 0:
            self.remarks.append(f"{self._results[index].hook} failed while steps were timed: {event['error']}.")
            if not self.settings.steps:
                self._change(index, status="failed", error=event["error"])
        if self.timing.error:
            self.remarks.append(f"Steps could not be timed in turn: {self.timing.error}.")
        if self.timing.is_over and not self.settings.steps:
            for index, result in enumerate(self._results):
                if result.status == "not run":
                    failed = (
                        {"status": "failed", "error": self.timing.error} if self.timing.error else {"status": "done"}
                    )
                    self._change(index, **failed)

    def _change(self, index: int, **changes: Any) -> None:
        self._results[index] = attrs.evolve(self._results[index], **changes)
