"""How long stretches of time last together, where some overlap. No torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable


def together(intervals: Iterable[tuple[float, float]]) -> float:
    """The length of their union: from each start to its end, where overlaps count once."""
    total, until = 0.0, float("-inf")
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total
