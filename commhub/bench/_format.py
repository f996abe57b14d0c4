"""Numbers as people read them. Three significant digits; a dash for what was not measured."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from commhub._printable import message_of, type_name, visible

if TYPE_CHECKING:
    from ._timed import Ratio

NOTHING = "-"


def printable(text: str, stream: object = None) -> str:
    """Lines of text with what is no visible character, or is none of the stream's, escaped."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return visible(text, keep="\n").encode(encoding, "backslashreplace").decode(encoding)


def seconds(value: float | None) -> str:
    """Seconds as ``87.1 ms`` or ``1.42 s``."""
    if value is None or math.isnan(value):
        return NOTHING
    return f"{_digits(value)} s" if value >= 1 else f"{_digits(value * 1e3)} ms"


def size(value: float | None) -> str:
    """Bytes as ``0 B``, ``3.36 MB`` (decimal units)."""
    if value is None or math.isnan(value):
        return NOTHING
    for unit in ("B", "kB", "MB"):
        if value < 999.5:
            return f"{value:.0f} {unit}" if unit == "B" else f"{_digits(value)} {unit}"
        value /= 1e3
    return f"{_digits(value)} GB"


def count(value: float) -> str:
    """A count as ``842 k``, ``4.83 M``."""
    for unit in ("", " k", " M"):
        if value < 999.5:
            return f"{value:.0f}" if not unit else f"{_digits(value)}{unit}"
        value /= 1e3
    return f"{_digits(value)} G"


def times(value: float | None) -> str:
    """A ratio as ``1.85x``; ``inf`` where nothing was sent."""
    if value is None or math.isnan(value):
        return NOTHING
    return f"{_digits(value)}x" if math.isfinite(value) else "inf"


def interval(value: Ratio | None) -> str:
    """A ratio with what it lies between: ``0.52 (0.51-0.54)``."""
    return NOTHING if value is None else f"{value.median:.3f} ({value.low:.3f}-{value.high:.3f})"


def rate(value: float | None) -> str:
    """Bits per second as ``94.1 mbit/s``."""
    if value is None or math.isnan(value):
        return NOTHING
    return f"{_digits(value / 1e9)} gbit/s" if value >= 999.5e6 else f"{_digits(value / 1e6)} mbit/s"


def share(value: float | None) -> str:
    """A share as ``37 %``."""
    return NOTHING if value is None or math.isnan(value) else f"{value:.0%}".replace("%", " %")


def loss(value: float | None) -> str:
    """A loss in nats per byte, with three decimals; ``nan`` where training diverged."""
    return NOTHING if value is None else f"{value:.3f}"


def error(err: BaseException) -> str:
    """An error in one line, with its type where the text alone would not tell."""
    lines = message_of(err).strip().splitlines() or [""]
    return f"{type_name(err)}: {lines[0]}".rstrip(": ")


def _digits(value: float) -> str:
    """Three significant digits, never in exponent form."""
    if value >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"
