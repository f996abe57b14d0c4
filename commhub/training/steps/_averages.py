"""What an engine knows of averages of the parameters."""

from __future__ import annotations

from typing import Protocol


class Averages(Protocol):
    """Averages of the parameters, as far as a step must know of them; ``Timetable`` is one."""

    def join(self) -> None:
        """Wait for what runs in the background."""

    def record(self, step: int) -> None:
        """A step's gradients are ready."""

    def run_due_in_background(self) -> None:
        """Average what is due, on a rank that must not wait here; ``join`` does."""
