"""Limits of numeric settings, with one text wherever a setting is given: as an option or in a rule."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs

if TYPE_CHECKING:
    from collections.abc import Mapping


@attrs.frozen
class Limit:
    """The least value of a setting; usable as a validator of an attrs field.

    Raises:
        ValueError: from a call, for a value that is not ``at least`` or, if exclusive, not ``above`` ``least``.
    """

    least: float
    exclusive: bool = False

    def __call__(self, _hook: object, field: attrs.Attribute[Any], value: float) -> None:
        self.check(field.name, value)

    def check(self, name: str, value: float) -> None:
        """Raise ValueError if ``value`` is below the limit."""
        if not (value > self.least if self.exclusive else value >= self.least):
            bound = "above" if self.exclusive else "at least"
            raise ValueError(f"{name} is {value!r}; it must be {bound} {self.least}.")


RANK = Limit(1)
RATE = Limit(0, exclusive=True)


def check_rule(settings: Mapping[str, object]) -> None:
    """Raise ValueError unless a rule's rank and min_compression_rate are what the options may be."""
    for name, limit in (("rank", RANK), ("min_compression_rate", RATE)):
        value = settings[name]
        assert isinstance(value, int | float)
        limit.check(name, value)
