"""How far the steps are that are timed in turn, and what they took so far. No torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ._timed import FLOOR, TimedStep

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ._progress import Progress


class Timing:
    """The steps of all hooks that are timed in turn.

    Attributes:
        is_over: whether nothing more comes, well or badly.
        is_under_way: whether it has begun and is not over.
        error: why it ended badly, if it did.
        dropped: why a hook fell out, by its index.
        trace: of the last steps, if that was asked for.
    """

    def __init__(self, progress: Progress, *, is_wanted: bool) -> None:
        self.is_over, self.is_under_way = not is_wanted, False
        self.error = ""
        self.dropped: dict[int, str] = {}
        self.trace: dict[str, Any] | None = None
        self._progress = progress
        self._steps: dict[int, list[TimedStep]] = {}

    def on_event(self, event: dict[str, Any]) -> bool:
        """Take in an event, if it is about this; whether it is."""
        kind = event["kind"]
        if kind == "race":
            self.is_under_way = True
            self._progress.start_timing(event["hooks"])
        elif kind == "timed":
            self._steps.setdefault(event["index"], []).append(TimedStep(**event["record"]))
            self._progress.timed()
        elif kind == "dropped":
            self._steps.pop(event["index"], None)
            self.dropped[event["index"]] = event["error"]
        elif kind == "timeline":
            self.trace = event["trace"]
        elif kind in ("raced", "race failed"):
            self.is_over, self.is_under_way = True, False
            if kind == "race failed":
                self.error = event["error"]
                self._steps.clear()
        else:
            return False
        return True

    def of(self, index: int) -> tuple[TimedStep, ...]:
        """What a hook's steps took."""
        return tuple(self._steps.get(index, ()))

    def floor(self, hooks: Sequence[str], nothing: str | None) -> tuple[TimedStep, ...]:
        """The steps without communication: of the hook among ``hooks`` that sends ``nothing``, or those beside them."""
        own = hooks.index(nothing) if nothing in hooks else FLOOR
        return self.of(own)
