"""What a network interface of this host has sent, as the kernel counts. No torch."""

from __future__ import annotations

from pathlib import Path

_COUNTERS = Path("/proc/net/dev")
_SENT = 8
"""The place of the bytes that were sent among an interface's counters."""


def sent_bytes(interface: str, counters: Path = _COUNTERS) -> int | None:
    """The bytes that an interface has sent, headers and all; ``None`` if there is none of that name, or no counters."""
    try:
        lines = counters.read_text().splitlines()
    except OSError:
        return None
    found = (line.partition(":") for line in lines)
    return next(
        (int(figures.split()[_SENT]) for name, colon, figures in found if colon and name.strip() == interface), None
    )
