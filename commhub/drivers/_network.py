"""A network in two numbers, for predicting and emulating the time that a collective takes. Imports no torch."""

from __future__ import annotations

import re

import attrs

_BITS = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12}
_SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6, "ns": 1e-9}


@attrs.frozen
class Network:
    """A link between ranks.

    Attributes:
        bandwidth: bits per second that one rank can send; ``None`` for no limit.
        latency: seconds that each collective takes on top of its bytes.

    >>> Network.parse("100mbit", "1ms").seconds(sent_bytes=12_500_000)
    1.001
    """

    bandwidth: float | None = None
    latency: float = 0.0

    def __attrs_post_init__(self) -> None:
        if self.bandwidth is not None and not 0 < self.bandwidth < float("inf"):
            raise ValueError(f"bandwidth is {self.bandwidth!r}; give bits per second above zero, or None.")
        if not 0 <= self.latency < float("inf"):
            raise ValueError(f"latency is {self.latency!r}; give seconds, zero or more.")

    @classmethod
    def parse(cls, bandwidth: str | None = None, latency: str | None = None) -> Network:
        """Read texts such as ``"100mbit"``, ``"1.5gbit"`` (bits per second) and ``"1ms"``, ``"50us"``.

        Raises:
            ValueError: with one line that says what was expected.
        """
        return cls(
            bandwidth=None if bandwidth is None else _bandwidth(bandwidth),
            latency=0.0 if latency is None else _latency(latency),
        )

    def seconds(self, sent_bytes: float) -> float:
        """The least time a collective takes in which a rank sends this many bytes."""
        return self.latency + self.occupied(sent_bytes)

    def occupied(self, sent_bytes: float) -> float:
        """The time for which those bytes keep the link busy (latency apart: it overlaps with the next message)."""
        return 0.0 if self.bandwidth is None else 8.0 * sent_bytes / self.bandwidth


def _bandwidth(text: str) -> float:
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?(?:e\d+)?)\s*([kmgt]?)bit(?:/s|ps)?\s*", text.lower())
    if not match or float(match[1]) == 0:
        raise ValueError(f"bandwidth {text!r} is not understood; write it like 100mbit or 1.5gbit (bits per second).")
    return float(match[1]) * _BITS[match[2]]


def _latency(text: str) -> float:
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?(?:e-?\d+)?)\s*(s|ms|us|µs|ns)\s*", text.lower())
    if not match:
        raise ValueError(f"latency {text!r} is not understood; write it like 1ms or 50us.")
    return float(match[1]) * _SECONDS[match[2]]
