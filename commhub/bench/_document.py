"""The JSON file: all that was measured, for programs. No torch."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import attrs

from ._limits import limits

if TYPE_CHECKING:
    from ._results import Outcome


def document(outcome: Outcome) -> dict[str, Any]:
    """The whole outcome as JSON knows it: seconds, bytes, nats per byte; None for what is not finite."""
    base = outcome.baseline
    hooks = [
        {
            "hook": result.hook,
            "ran_as": result.ran_as,
            "status": result.status,
            "error": result.error,
            "loss": result.loss,
            "validation_loss": result.validation_loss,
            "step_seconds": result.step_seconds,
            "step_seconds_quartiles": result.step_quartiles,
            "sent_bytes_per_step": result.sent_bytes,
            "compression": result.compression,
            "speedup": outcome.speedup(result),
            "split_seconds": result.split,
            "limits": None if (found := limits(outcome, result)) is None else attrs.asdict(found),
            "timed_steps": [attrs.asdict(step) for step in result.race],
            "steps": [attrs.asdict(record) for record in result.records],
        }
        for result in outcome.results
    ]
    made = {
        "schema": 1,
        "command": outcome.command,
        "settings": outcome.settings,
        "machine": outcome.machine,
        "setup": outcome.setup,
        "emulated_link": outcome.link or None,
        "link": {"hosts": outcome.hosts, "bits_per_second": outcome.bandwidth, "told": outcome.told_link},
        "remarks": list(outcome.remarks),
        "baseline": base.hook if base else None,
        "hooks": hooks,
    }
    finite: dict[str, Any] = _finite(made)
    return finite


def _finite(value: Any) -> Any:
    """The same document without NaN and infinity, which JSON cannot hold."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
