"""What a bench tells while it runs, and the words for it. What shows them is in ``_display.py``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import attrs

from commhub.bench import _format

from ._sizes import SIZES

if TYPE_CHECKING:
    from ._options import Settings
    from ._results import StepRecord

TIMING = "timing steps in turn"


class Progress(Protocol):
    """What a bench tells while it runs."""

    def begin(self, settings: Settings, setup: dict[str, Any], link: str) -> None:
        """The ranks are up and said what they found."""

    def start(self, hook: str) -> None:
        """Training under ``hook`` begins."""

    def step(self, record: StepRecord) -> None:
        """A step is over."""

    def start_timing(self, hooks: int) -> None:
        """Steps of so many hooks are about to be timed in turn."""

    def timed(self) -> None:
        """One of them is over."""

    def end(self, text: str) -> None:
        """The hook that was started is over; ``text`` says how."""

    def close(self) -> None:
        """Nothing more comes; leave the terminal as it was."""


def told_link(wanted: Settings, ran: Settings, hosts: int) -> str:
    """What the ranks communicate over.

    Args:
        wanted: the settings as given.
        ran: as the ranks were given them: they emulate what the link of ``hosts`` does not do by itself.
        hosts: that were made; 0 if none were.
    """
    emulated = f"emulated: {ran.link}" if ran.emulated else ""
    if not hosts:
        return emulated or "as it is"
    own = attrs.evolve(wanted, latency=None if ran.latency else wanted.latency).link or "without a limit"
    return f"between {hosts} hosts on this machine: {own}" + (f"; {emulated}" if emulated else "")


def headline(settings: Settings, setup: dict[str, Any], link: str) -> str:
    """What is trained, on what, and over which link."""
    size = SIZES[settings.model]
    text = settings.data or "Python's standard library"
    threads = f"{setup['threads']} thread{'s' if setup['threads'] > 1 else ''} each"
    return (
        f"{settings.model} transformer, {_format.count(setup['parameters'])} parameters; "
        f"{text}, {_format.size(setup['text_bytes'])}\n"
        f"{setup['world_size']} ranks on {setup['device']} ({setup['backend']}, {threads}); "
        f"{settings.batch} x {size.context} bytes per rank and step, {settings.optimizer}; link {link}"
    )


def measured(record: StepRecord, sent_bytes: float) -> str:
    """The figures of a progress line."""
    seconds, sent = _format.seconds(record.seconds), _format.size(sent_bytes)
    return f"loss {_format.loss(record.loss)}  {seconds}/step  sent {sent}"
