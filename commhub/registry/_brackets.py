"""Cutting text at commas outside brackets and quotes, which is all that hook strings need of a scanner."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from commhub._errors import HookOptionError

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["closing", "malformed", "pieces"]

_CLOSES: Final = {"(": ")", "[": "]", "{": "}"}
_DEEPEST: Final = 100
"""Brackets within brackets: more is a mistake, and found before Python's own stack ends."""


def malformed(text: str, position: int, what: str) -> HookOptionError:
    """The error for a hook string that cannot be read."""
    return HookOptionError(
        f"hook string {text!r}, position {position}: {what}. Write it as name(key=value, key=value)."
    )


def closing(text: str, start: int) -> int:
    """Where the bracket at ``start`` is closed.

    Raises:
        HookOptionError: if it is not.
    """
    for position, depth in _outside_quotes(text, start, len(text)):
        if depth == 0:
            return position
    raise malformed(text, start, "this bracket is never closed")


def pieces(text: str, start: int, stop: int) -> Iterator[tuple[int, int]]:
    """Yield the ranges between commas outside brackets and quotes; at least one, perhaps empty.

    Raises:
        HookOptionError: where a bracket or quote is left open.
    """
    begin = start
    for position, depth in _outside_quotes(text, start, stop):
        if depth == 0 and text[position] == ",":
            yield begin, position
            begin = position + 1
    yield begin, stop


def _outside_quotes(text: str, start: int, stop: int) -> Iterator[tuple[int, int]]:
    """Yield every position outside quotes, with the number of brackets open after it."""
    opened: list[int] = []
    quote = -1
    escaped = False
    for position in range(start, stop):
        character = text[position]
        if quote >= 0:
            if escaped:
                escaped = False
            elif character == "\\":
                escaped = True
            elif character == text[quote]:
                quote = -1
            continue
        if character in "'\"":
            quote = position
            continue
        if character in _CLOSES:
            opened.append(position)
            if len(opened) > _DEEPEST:
                raise malformed(text, position, "it is nested too deeply")
        elif character in ")]}":
            if not opened or _CLOSES[text[opened[-1]]] != character:
                raise malformed(text, position, f"{character!r} closes nothing")
            opened.pop()
        yield position, len(opened)
    if quote >= 0:
        raise malformed(text, quote, "this quote is never closed")
    if opened:
        raise malformed(text, opened[-1], "this bracket is never closed")
