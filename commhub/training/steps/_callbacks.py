"""What a hook's ``prepare`` asked to be called back for."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import attrs

from commhub._errors import HookError, described

if TYPE_CHECKING:
    from collections.abc import Callable

logger = logging.getLogger("commhub")


@attrs.define(eq=False)
class Callbacks:
    """The functions of one registration.

    Attributes:
        after_step: called with the step's number when its averages are in the parameters' ``.grad``.
        at_end: called once, when the registration ends.
        settle: called with whether a step counts that did not end well here.
    """

    after_step: list[Callable[[int], None]] = attrs.Factory(list)
    at_end: list[Callable[[], None]] = attrs.Factory(list)
    settle: list[Callable[[bool], None]] = attrs.Factory(list)

    def end(self) -> None:
        """Call the functions in ``at_end``, the last first, and never again; one that raises is logged."""
        while self.at_end:
            _logged(self.at_end.pop(), "when it ends")

    def settled(self, happened: bool) -> None:
        """Call the functions in ``settle``; one that raises is logged."""
        for function in self.settle:
            _logged(lambda function=function: function(happened), "about a step that failed")  # type: ignore[misc]


def _logged(function: Callable[[], None], when: str) -> None:
    try:
        function()
    except BaseException as error:
        logger.exception("what a hook does %s has failed: %s", when, described(error))
        if isinstance(error, KeyboardInterrupt):
            raise


def call_after(function: Callable[[int], None], step: int, hook: str, rank: int) -> HookError | None:
    """Call ``function(step)``; return what it raises, for the caller to raise where it harms nothing but the step."""
    try:
        function(step)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # noqa: BLE001 - a hook may raise anything
        failure = HookError(f"{hook}, step {step}, rank {rank}: after_step raised {described(error)}")
        failure.__cause__ = error
        return failure
    return None
