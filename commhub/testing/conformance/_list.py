"""All checks, in the order in which they run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from commhub.testing.conformance import (
    _averagers,
    _bytes,
    _feedback,
    _modes,
    _numbers,
    _on_ranks,
    _scattered,
    _sharded,
    _state,
    _static,
)

from ._check import MADE

if TYPE_CHECKING:
    from ._check import Check

_MODULES = (_static, _numbers, _feedback, _bytes, _on_ranks, _modes, _state, _averagers, _sharded, _scattered)


def all_checks() -> tuple[Check, ...]:
    """Every check, basic ones first: in the order of the modules, and in each from top to bottom."""
    places = {module.__name__: place for place, module in enumerate(_MODULES)}
    return tuple(sorted(MADE.values(), key=lambda c: (places[c.run.__module__], c.run.__code__.co_firstlineno)))
