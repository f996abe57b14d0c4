"""What goes along with compressing buckets: how much was saved."""

from __future__ import annotations

import logging

logger = logging.getLogger("commhub")


class Tally:
    """Elements before and after compression, over all compressed steps of this process.

    Args:
        name: of the hook, for the log.
        frequency: after so many steps each, ``log`` says how it stands.
    """

    def __init__(self, name: str, frequency: int) -> None:
        self._name, self._frequency = name, frequency
        self.before = self.after = 0

    def count(self, before: int, after: int) -> None:
        """Add one bucket's elements."""
        self.before += before
        self.after += after

    def figures(self) -> tuple[float, int, int]:
        """The rate of compression, and the elements before and after it; zeros before the first compressed step."""
        return (self.before / self.after if self.after else 0.0), self.before, self.after

    def log(self, step: int) -> None:
        """For ``Setup.after_step``: one INFO line every ``frequency`` steps."""
        if self.after and (step + 1) % self._frequency == 0:
            rate, before, after = self.figures()
            text = "%s: %d elements sent as %d by step %d, a rate of %.1f"
            logger.info(text, self._name, before, after, step + 1, rate)
