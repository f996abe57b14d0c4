"""A check, how a function becomes one, and what comes of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import attrs

if TYPE_CHECKING:
    from collections.abc import Callable

Where = Literal["static", "simulated", "ranks", "processes", "sharded"]
Status = Literal["passed", "failed", "expected failure", "not applicable"]


class NotApplicableError(Exception):
    """Raised by a check that has nothing to say about a subject; the message says why."""


@attrs.frozen(kw_only=True)
class CheckResult:
    """What came of one check.

    Attributes:
        check: its name.
        nproc: on how many ranks it ran; 0 for those that need none.
        status: ``"passed"``, ``"failed"``, ``"expected failure"`` or ``"not applicable"``.
        reason: why it is not ``"passed"``; empty where it is.
        seconds: how long it took.
    """

    check: str
    nproc: int
    status: Status
    reason: str
    seconds: float


@attrs.frozen(kw_only=True)
class Check:
    """One rule.

    Attributes:
        name: what users call it.
        summary: the rule in one line.
        where: ``"static"`` in this process; ``"simulated"`` in a process of its own; ``"ranks"`` on every rank of a
            group; ``"processes"`` given the pool of ranks; ``"sharded"`` on four ranks, two replicas of two shards.
        kinds: for hooks, averagers or both.
        after: checks without which this one would only repeat what they say.
        run: called with the subject (and the pool and number of ranks, for ``"processes"``); raises where the rule
            is broken, ``NotApplicableError`` where there is nothing to check.
    """

    name: str
    summary: str
    where: Where
    kinds: tuple[str, ...]
    after: tuple[str, ...]
    run: Callable[..., Any]


MADE: dict[str, Check] = {}
"""By name, the checks of the modules that are loaded."""


def rule(where: Where, *, kinds: tuple[str, ...] = ("hook",), after: tuple[str, ...] = ()) -> Callable[..., Any]:
    """Make a function a check: its name is the check's, its docstring's first line the summary."""

    def mark(function: Callable[..., Any]) -> Callable[..., Any]:
        summary = (function.__doc__ or "").strip().partition("\n")[0]
        assert summary, f"{function.__name__} has no docstring"
        assert function.__name__ not in MADE, f"{function.__name__} is there twice"
        MADE[function.__name__] = Check(
            name=function.__name__, summary=summary, where=where, kinds=kinds, after=after, run=function
        )
        return function

    return mark
