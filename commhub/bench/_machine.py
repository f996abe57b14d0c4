"""What can be said about this machine without torch."""

from __future__ import annotations

import os
import platform

from commhub._version import __version__


def available_cores() -> int:
    """The cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def threads_per_rank(wanted: int | None, ranks: int) -> int:
    """What each of the ranks on this machine computes with: as wanted, else an equal share of the cores."""
    return wanted or max(1, available_cores() // ranks)


def describe_machine() -> dict[str, object]:
    """System, cores and Python version, for reports."""
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cores": available_cores(),
        "python": platform.python_version(),
        "commhub": __version__,
    }
