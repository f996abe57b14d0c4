"""How near each hook comes to what the link allows, from steps that were timed in turn. No torch."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING

import attrs

from ._timed import ratio

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ._results import HookResult, Outcome
    from ._timed import Ratio, TimedStep


@attrs.frozen(kw_only=True)
class Limits:
    """One hook's figures against the link; medians of its steps. What cannot be told is ``None``.

    Attributes:
        ratio: its step time over the baseline's, in the same rounds.
        floor_seconds: no step can take less: the step without communication, or the time that its bytes take.
        over_floor: its step time over that.
        bus_bits_per_second: what a rank sends, over the time in which any of its messages was on its way.
        hidden: the share of communication, encoding and decoding included, that training did not wait for.
        extra_cpu_seconds: CPU time beyond that of the step without communication.
        interface_bytes: what left a host in a step, as its network interface counts.
    """

    ratio: Ratio | None
    floor_seconds: float | None
    over_floor: float | None
    bus_bits_per_second: float | None
    hidden: float | None
    extra_cpu_seconds: float | None
    interface_bytes: float | None


def limits(outcome: Outcome, result: HookResult) -> Limits | None:
    """How near a hook comes to its limits; ``None`` where its steps were not timed in turn with others."""
    if not result.race:
        return None
    base = outcome.baseline
    floor = _floor(outcome, result)
    seconds, wire = _median(result.race, lambda x: x.seconds), _median(result.race, lambda x: x.wire)
    sent = _median(result.race, lambda x: x.sent_bytes)
    cpu = _median(result.race, lambda x: x.cpu_seconds)
    busy = _median(result.race, lambda x: x.busy)
    exposed = _median(result.race, lambda x: x.encode + x.wait + x.decode)
    measured = [x.interface_bytes for x in result.race if x.interface_bytes is not None]
    return Limits(
        ratio=None if base is None else ratio(result.race, base.race),
        floor_seconds=floor,
        over_floor=seconds / floor if floor else None,
        bus_bits_per_second=8 * sent / wire if wire > 0 and sent else None,
        hidden=max(0.0, 1 - exposed / busy) if busy > 0 and sent else None,  # which NaN is not
        extra_cpu_seconds=cpu - _median(outcome.floor, lambda x: x.cpu_seconds) if outcome.floor else None,
        interface_bytes=statistics.median(measured) if measured else None,
    )


def _floor(outcome: Outcome, result: HookResult) -> float | None:
    bits = 8 * _median(result.race, lambda x: x.sent_bytes)
    least = [bits / outcome.bandwidth] if outcome.bandwidth else []
    if outcome.floor:
        least.append(_median(outcome.floor, lambda x: x.seconds))
    return max(least, default=None)


def _median(steps: Sequence[TimedStep], figure: Callable[[TimedStep], float]) -> float:
    return statistics.median(figure(step) for step in steps)
