"""The test harness: functions on real ranks in milliseconds, and plugins that exist for one test.

Ships with commhub, so that a plugin's own tests run on it too. Importing this package imports neither torch nor
pytest: each name loads when it is first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from commhub.testing._context import Rank, current
    from commhub.testing._outcome import RankError, RankFailure, RankResult
    from commhub.testing._pool import RankPool

_HOMES = {
    "Rank": "_context",
    "RankError": "_outcome",
    "RankFailure": "_outcome",
    "RankPool": "_pool",
    "RankResult": "_outcome",
    "current": "_context",
}

__all__ = ["Rank", "RankError", "RankFailure", "RankPool", "RankResult", "current"]


def __getattr__(name: str) -> Any:
    """Import the module that `name` lives in."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
