"""A network in two numbers, for predicting and emulating the time that a collective takes. Imports no torch."""

from __future__ import annotations

import re

import attrs

from commhub._errors import HookOptionError, HookOptionTypeError
from commhub._printable import shown

_BITS = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12}
_SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6, "ns": 1e-9}
_MOST = 1e300


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
        if self.bandwidth is not None and not (_is_number(self.bandwidth) and 0 < self.bandwidth <= _MOST):
            raise HookOptionError(f"bandwidth is {shown(self.bandwidth)}; give bits per second above zero, or None.")
        if not (_is_number(self.latency) and 0 <= self.latency <= _MOST):
            raise HookOptionError(f"latency is {shown(self.latency)}; give seconds, zero or more.")

    @classmethod
    def of(cls, network: object) -> Network | None:
        """What ``network=`` means: a ``Network``, its bandwidth as a text such as ``"100mbit"``, or ``None``.

        Raises:
            HookOptionError: if it means none.
        """
        if network is None or isinstance(network, cls):
            return network
        if isinstance(network, str):
            return cls.parse(network)
        raise HookOptionTypeError(
            f"network is {shown(network)}; give a commhub.Network, a bandwidth such as '100mbit', or None."
        )

    @classmethod
    def parse(cls, bandwidth: str | None = None, latency: str | None = None) -> Network:
        """Read texts such as ``"100mbit"``, ``"1.5gbit"`` (bits per second) and ``"1ms"``, ``"50us"``.

        Raises:
            HookOptionError: with one line that says what was expected.
        """
        for name, text in (("bandwidth", bandwidth), ("latency", latency)):
            if text is not None and not isinstance(text, str):
                raise HookOptionTypeError(f"{name} is {shown(text)}; give a text such as '100mbit' or '1ms'.")
        return cls(
            bandwidth=None if bandwidth is None else _bandwidth(bandwidth),
            latency=0.0 if latency is None else _latency(latency),
        )

    def seconds(self, sent_bytes: float) -> float:
        """The least time a collective takes in which a rank sends this many bytes."""
        return self.latency + self.occupied(sent_bytes)

    def occupied(self, sent_bytes: float) -> float:
        """The time for which those bytes keep the link busy (latency apart: it overlaps with the next message).

        Raises:
            HookOptionError: if that is no number of bytes.
        """
        if not (_is_number(sent_bytes) and 0 <= sent_bytes <= _MOST):
            raise HookOptionError(f"sent_bytes is {shown(sent_bytes)}; give a number of bytes, zero or more.")
        return 0.0 if self.bandwidth is None else 8.0 * sent_bytes / self.bandwidth


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _bandwidth(text: str) -> float:
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?(?:e\d+)?)\s*([kmgt]?)bit(?:/s|ps)?\s*", text.lower())
    if not match or float(match[1]) == 0:
        raise HookOptionError(
            f"bandwidth {shown(text)} is not understood; write it like 100mbit or 1.5gbit (bits per second)."
        )
    return float(match[1]) * _BITS[match[2]]


def _latency(text: str) -> float:
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?(?:e-?\d+)?)\s*(s|ms|us|µs|ns)\s*", text.lower())
    if not match:
        raise HookOptionError(f"latency {shown(text)} is not understood; write it like 1ms or 50us.")
    return float(match[1]) * _SECONDS[match[2]]
