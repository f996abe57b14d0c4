"""The test harness: functions on real ranks in milliseconds, and plugins that exist for one test.

Ships with commhub, so that a plugin's own tests run on it too. Importing this package imports neither torch
nor pytest: each name loads when it is first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from commhub.testing.conformance._check import CheckResult
    from commhub.testing.conformance._run import check_hook, parametrize_with_checks

    from ._compare import assert_equal_across_ranks, bitwise_equal
    from ._context import Rank, current
    from ._memory import Largest, Living, Watched
    from ._models import Branches, EveryKind, Run, batches, mlp, train
    from ._outcome import RankError, RankFailure, RankResult
    from ._pool import RankPool
    from .plugins import TemporaryPlugin, temporary_plugin

_HOMES = {
    "Branches": "_models",
    "CheckResult": "conformance._check",
    "EveryKind": "_models",
    "Largest": "_memory",
    "Living": "_memory",
    "Rank": "_context",
    "RankError": "_outcome",
    "RankFailure": "_outcome",
    "RankPool": "_pool",
    "RankResult": "_outcome",
    "Run": "_models",
    "TemporaryPlugin": "plugins",
    "Watched": "_memory",
    "assert_equal_across_ranks": "_compare",
    "batches": "_models",
    "bitwise_equal": "_compare",
    "check_hook": "conformance._run",
    "current": "_context",
    "mlp": "_models",
    "parametrize_with_checks": "conformance._run",
    "temporary_plugin": "plugins",
    "train": "_models",
}

__all__ = [
    "Branches",
    "CheckResult",
    "EveryKind",
    "Largest",
    "Living",
    "Rank",
    "RankError",
    "RankFailure",
    "RankPool",
    "RankResult",
    "Run",
    "TemporaryPlugin",
    "Watched",
    "assert_equal_across_ranks",
    "batches",
    "bitwise_equal",
    "check_hook",
    "current",
    "mlp",
    "parametrize_with_checks",
    "temporary_plugin",
    "train",
]


def __getattr__(name: str) -> Any:
    """Import the module that ``name`` lives in."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
