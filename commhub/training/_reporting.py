"""Figures that go to a logger of the user's every so many steps."""

from __future__ import annotations

import copy
import logging
import time
import weakref
from typing import TYPE_CHECKING, Any

import attrs

from commhub._errors import HookOptionError, described
from commhub._printable import shown
from commhub.drivers._stats import StepStats

if TYPE_CHECKING:
    from collections.abc import Callable

    from commhub.drivers._stats import Stats

    Receiver = Callable[[dict[str, float], int, str], None]

logger = logging.getLogger("commhub")

_PATIENCE = 3
"""How often in a row a receiver may raise before it is told nothing more."""
_MOST = 2**63


def interval(every: object) -> int:
    """How many steps lie between two reports.

    Raises:
        HookOptionError: if that is no number of steps.
    """
    if isinstance(every, bool) or not isinstance(every, int) or not 1 <= every < _MOST:
        raise HookOptionError(f"report(every={shown(every, 40)}): give a number of steps, 1 or more.")
    return every


def receiver(to: object) -> Receiver:
    """What is called with the figures, the step and the hook string.

    Raises:
        HookOptionError: if ``to`` is nothing that takes figures.
    """
    writer: Any = to
    if isinstance(to, str) and to == "log":
        return _log
    is_object = not isinstance(to, type)
    if is_object and callable(getattr(writer, "add_scalar", None)):
        return _Writer(writer)
    if is_object and callable(to):
        return lambda figures, step, _hook: writer(figures, step)
    raise HookOptionError(
        f'report(to={shown(to, 80)}): give a function (figures, step), "log", or a writer that has add_scalar.'
    )


def _log(figures: dict[str, float], step: int, hook: str) -> None:
    sent, compression, *seconds = (
        figures[f"commhub/{name}"] for name in ("sent_bytes", "compression", "step_seconds", "exposed_seconds")
    )
    parts = (figures[f"commhub/{name}_seconds"] for name in ("encode", "wait", "decode"))
    logger.info(
        "step %d, %s: %.0f bytes sent a step, compression %.1f; a step took %.4f s, training stood still for %.4f s of "
        "it; encode %.4f s, wait %.4f s, decode %.4f s",
        *(step, hook, sent, compression, *seconds, *parts),
    )


class _Writer:
    """TensorBoard's ``SummaryWriter``, or what looks like it."""

    def __init__(self, writer: Any) -> None:
        self._writer, self._told = writer, ""

    def __call__(self, figures: dict[str, float], step: int, hook: str) -> None:
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)
        if hook != self._told and callable(getattr(self._writer, "add_text", None)):
            self._writer.add_text("commhub/hook", hook, step)
            self._told = hook


@attrs.define(eq=False)
class Report:
    """Tells one receiver the means of each interval.

    Attributes:
        is_over: whether it has failed too often in a row.
    """

    _every: int
    _receive: Receiver
    _before: Stats
    is_over: bool = attrs.field(default=False, init=False)
    _since: float = attrs.field(factory=time.monotonic, init=False)
    _failures: int = attrs.field(default=0, init=False)

    def __attrs_post_init__(self) -> None:
        self._before = copy.deepcopy(self._before)

    def step_ended(self, stats: Stats, step: int, hook: str) -> None:
        """Report, if an interval is over. A Ctrl-C or an exit comes out, any other failure is logged."""
        if stats.steps - self._before.steps < self._every:
            return
        now = time.monotonic()
        figures = means(self._before, stats, now - self._since)
        self._before, self._since = copy.deepcopy(stats), now
        try:
            self._receive(figures, step, hook)
        except Exception as error:
            self._failures += 1
            self.is_over = self._failures >= _PATIENCE
            last = f"; it did {_PATIENCE} times in a row and is told nothing more" if self.is_over else ""
            logger.exception("what report() calls has failed at step %d: %s%s", step, described(error), last)
        else:
            self._failures = 0


def means(before: Stats, now: Stats, seconds: float) -> dict[str, float]:
    """The means per step since ``before``, ``seconds`` ago, by the names under which they are reported."""
    steps = now.steps - before.steps
    names = ("logical_bytes", "sent_bytes", "encode_seconds", "wait_seconds", "decode_seconds")
    mean = StepStats(*((getattr(now, name) - getattr(before, name)) / steps for name in names))
    exposed = sum(now.exposed.values()) - sum(before.exposed.values())
    figures = {name: getattr(mean, name) for name in names}
    figures |= {"compression": mean.compression, "exposed_seconds": exposed / steps, "step_seconds": seconds / steps}
    return {f"commhub/{name}": float(value) for name, value in figures.items()}


class Reports:
    """The reports of one registration, kept alive by somebody else, as ``Observers`` are."""

    def __init__(self) -> None:
        self._all: list[weakref.ref[Report]] = []

    def add(self, report: Report) -> None:
        """Tell this one too."""
        self._all.append(weakref.ref(report))

    def remove(self, report: Report) -> None:
        """Tell this one nothing more."""
        self._all = [reference for reference in self._all if reference() not in (None, report)]

    def everyone(self) -> list[Report]:
        """Those who are told."""
        return [report for reference in self._all if (report := reference()) is not None]
