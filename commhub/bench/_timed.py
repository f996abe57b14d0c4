"""Steps that were timed in turn with those of other hooks, and what two hooks' figures say of each other. No torch."""

from __future__ import annotations

import math
import statistics
from typing import TYPE_CHECKING

import attrs

if TYPE_CHECKING:
    from collections.abc import Sequence

FLOOR = -1
"""The index of a step without communication, which is timed beside the hooks where none of them is that."""
_CONFIDENCE = 0.95


@attrs.frozen(kw_only=True)
class TimedStep:
    """One step of forward, backward and update, averaged over the ranks. Times are seconds.

    Attributes:
        repeat: in which round of all hooks.
        cpu_seconds: of all threads of a rank.
        encode, wait, decode: for how long the training thread stood still while the hook worked.
        wire: for how long any message of the hook was on its way.
        busy: for how long any bucket was being encoded, on its way or being decoded.
        sent_bytes: what one rank sent, as the hook's collectives need.
        reference_bytes: what one rank would have sent in a plain all-reduce of the same gradients.
        interface_bytes: what left a host, as its network interface counts; ``None`` where there is none to ask.
    """

    repeat: int
    seconds: float
    cpu_seconds: float
    encode: float
    wait: float
    decode: float
    wire: float
    busy: float
    sent_bytes: float
    reference_bytes: float
    interface_bytes: float | None = None


@attrs.frozen
class Ratio:
    """A median of ratios of steps that were taken in the same rounds.

    Attributes:
        low, high: between which it lies with a confidence of at least 95 %; the extremes where there are too few.
    """

    median: float
    low: float
    high: float


def ratio(steps: Sequence[TimedStep], base: Sequence[TimedStep]) -> Ratio | None:
    """How long steps take over how long those of ``base`` take, round by round; ``None`` without a common round.

    The interval is that of the median's order statistics, which assumes nothing about how times scatter.
    """
    seconds = {step.repeat: step.seconds for step in base}
    ratios = sorted(step.seconds / seconds[step.repeat] for step in steps if seconds.get(step.repeat))
    if not ratios:
        return None
    skipped = _skipped(len(ratios))
    return Ratio(statistics.median(ratios), ratios[skipped], ratios[-1 - skipped])


def _skipped(count: int) -> int:
    """How many of the least, and of the greatest, of so many values can be left out of the median's interval."""
    tail, skipped = 0.0, 0
    while skipped < count // 2:
        tail += math.comb(count, skipped) / 2.0**count
        if 2 * tail > 1 - _CONFIDENCE:
            break
        skipped += 1
    return max(0, skipped - 1)
