"""Hook strings: ``[distribution:]name[(key=value, ...)]``, read and written.

One notation serves ``register``, the command line, configuration files and what is printed, so reading what was
written gives the same again. This module knows the notation only: not which hooks exist, nor which options.
"""

from __future__ import annotations

import functools
import re
from typing import TYPE_CHECKING, Final

import attrs

from commhub._errors import HookOptionError, HookOptionTypeError
from commhub._printable import shown

from ._brackets import closing, malformed, pieces

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["HookString", "canonical_distribution", "canonical_name", "literal", "parse", "parse_any", "split", "write"]

_DISTRIBUTION: Final = r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?"
_NAME: Final = r"[A-Za-z][A-Za-z0-9_-]*"
_HEAD: Final = re.compile(rf"\s*(?:({_DISTRIBUTION})\s*:\s*)?({_NAME})\s*", re.ASCII)
_ANY_HEAD: Final = re.compile(r"(?:([^(]*):)?([^(:]*)")
_NESTED: Final = re.compile(rf"{_DISTRIBUTION}\s*:|{_NAME}\s*\(", re.ASCII)
_KEY: Final = re.compile(r"\s*([A-Za-z_][A-Za-z0-9_]*)\s*=\s*", re.ASCII)
_WORD: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]*", re.ASCII)
_WORDS: Final[dict[str, object]] = {"true": True, "false": False, "none": None}
_PLAIN: Final = (bool, int, float, str, list, tuple, dict)


def canonical_name(name: str) -> str:
    """The one spelling under which a name is looked up: ``Power-SGD`` and ``power_sgd`` are the same."""
    return name.strip().lower().replace("-", "_")


def canonical_distribution(name: str) -> str:
    """A distribution's normalised name, as package indexes compare it."""
    return re.sub(r"[-_.]+", "-", name.strip()).lower()


def _copy(options: Mapping[str, object]) -> dict[str, object]:
    return dict(options)


@attrs.frozen(kw_only=True)
class HookString:
    """A hook string in parts; ``str()`` gives its canonical form, with the options sorted by name.

    ``parse(str(x)) == x`` holds for every ``x`` whose values can be written (see ``write``).

    Attributes:
        name: as it was written; names that are looked up alike are equal.
        options: by name, their values.
        distribution: normalised; ``None`` where there is none.
    """

    name: str = attrs.field(eq=canonical_name)
    options: Mapping[str, object] = attrs.field(factory=dict, converter=_copy, hash=False)
    distribution: str | None = attrs.field(default=None, converter=attrs.converters.optional(canonical_distribution))

    def __str__(self) -> str:
        return write(canonical_name(self.name), self.distribution, self.options)


def write(name: str, distribution: str | None, options: Mapping[str, object]) -> str:
    """The hook string of these parts, with the options sorted and the name as it is.

    Raises:
        HookOptionError: for a value that cannot be written. Numbers other than NaN, booleans, None, strings, and lists,
            tuples and dicts of these can.
    """
    head = f"{distribution}:{name}" if distribution else name
    if not options:
        return head
    return f"{head}({', '.join(f'{key}={_write(value)}' for key, value in sorted(options.items()))})"


def parse(text: str) -> HookString:
    """Read one hook string.

    A value is a Python literal, a bare word (``true``, ``false`` and ``none`` in any case, else a string), or a
    nested hook string, which stays a string in canonical form.

    Raises:
        HookOptionError: with the position, if the text is malformed or gives a key twice.

    >>> parse("powersgd(rank=4, wire=bf16)").options
    {'rank': 4, 'wire': 'bf16'}
    """
    return _safely(text, _HEAD)


def parse_any(text: str) -> HookString:
    """Read one hook string whose name may be that of any class, as a registration of a hook object writes it.

    Raises:
        HookOptionError: as ``parse``, for malformed options.
    """
    return _safely(text, _ANY_HEAD)


def split(text: str) -> tuple[str, ...]:
    """Split a comma-separated list of hook strings outside brackets and quotes.

    Raises:
        HookOptionError: when an item is empty or a bracket or quote is left open.

    >>> split("fp16, powersgd(rank=4, wire=bf16)")
    ('fp16', 'powersgd(rank=4, wire=bf16)')
    """
    if not text.strip():
        return ()
    items = []
    for start, stop in pieces(text, 0, len(text)):
        item = text[start:stop].strip()
        if not item:
            raise malformed(text, start, "an item of the list is empty")
        items.append(item)
    return tuple(items)


def _safely(text: str, begins: re.Pattern[str]) -> HookString:
    if not isinstance(text, str):
        raise HookOptionTypeError(f"{shown(text)} is no hook string. Write it like 'powersgd(rank=4)'.")
    try:
        return _parse(text, begins)
    except RecursionError:
        raise malformed(text, 0, "it is nested too deeply") from None


def _parse(text: str, begins: re.Pattern[str] = _HEAD) -> HookString:
    head = begins.match(text)
    if not head:
        raise malformed(text, 0, "it does not begin with a hook's name")
    options: dict[str, object] = {}
    if head.end() < len(text):
        inside = head.end() + 1
        if text[head.end()] != "(":
            raise malformed(text, head.end(), f"{text[head.end()]!r} cannot follow the name")
        end = closing(text, head.end())
        if text[end + 1 :].strip():
            raise malformed(text, end + 1, "something follows the closing bracket")
        ranges = list(pieces(text, inside, end))
        if not text[slice(*ranges[-1])].strip():
            ranges.pop()  # ``name()``, or a comma after the last option
        for start, stop in ranges:
            key = _KEY.match(text, start, stop)
            if not key:
                raise malformed(text, start, f"{text[start:stop].strip()!r} is not of the form key=value")
            if key[1] in options:
                raise malformed(text, key.start(1), f"{key[1]} is given twice")
            options[key[1]] = _read(text, key.end(), stop)
    return HookString(name=head[2], distribution=head[1], options=options)


def _read(text: str, start: int, stop: int) -> object:
    """The value that ``text[start:stop]`` stands for."""
    import ast  # only texts with options pay for it

    value = text[start:stop].strip()
    if value.lower() in _WORDS:
        return _WORDS[value.lower()]
    if _WORD.fullmatch(value):
        return value
    try:
        literal: object = ast.literal_eval(value)
    except (ValueError, TypeError, SyntaxError, MemoryError) as err:
        if _NESTED.match(value):
            return _nested(value)
        what = f"the value {value!r} cannot be read; put text in quotes" if value else "a value is missing"
        raise malformed(text, start, what) from err
    if not _is_plain(literal):
        raise malformed(text, start, f"the value {value!r} is none of number, boolean, text, list, tuple, dict")
    return literal


@functools.lru_cache(maxsize=256)
def _nested(text: str) -> str:
    """A nested hook string in canonical form. Writing one reads what is inside it again: remembered, once."""
    return str(_parse(text))


def _is_plain(value: object) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(map(_is_plain, value)) and all(map(_is_plain, value.values()))
    return value is None or isinstance(value, _PLAIN)


def _write(value: object) -> str:
    """The text that reads back as ``value``, a string without quotes where that is the same."""
    if not isinstance(value, str):
        return literal(value)
    try:
        plain = parse(f"x(x={value})").options["x"]
    except HookOptionError:
        plain = None
    return str.__str__(value) if plain == value else literal(value)


def literal(value: object) -> str:
    """The Python literal of a plain value, the same for equal values, however their dicts were built.

    Raises:
        HookOptionError: for a value that has none, or is a number too long to be written.
    """
    if value is None or isinstance(value, bool):
        return repr(value)
    if isinstance(value, str):
        return str.__repr__(value)
    if isinstance(value, int):
        return _number(value)
    if isinstance(value, float) and value == value:  # NaN equals nothing and has no literal
        return float.__repr__(value).replace("inf", "1e999")
    if isinstance(value, list):
        return f"[{', '.join(map(literal, value))}]"
    if isinstance(value, tuple):
        return f"({', '.join(map(literal, value))}{',' if len(value) == 1 else ''})"
    if isinstance(value, dict):
        # Equal dicts must print alike on every rank, however they were built.
        items = sorted(f"{literal(key)}: {literal(entry)}" for key, entry in value.items())
        return f"{{{', '.join(items)}}}"
    raise HookOptionError(f"{shown(value)} cannot be written in a hook string: use numbers, text, lists and dicts.")


def _number(value: int) -> str:
    try:
        return int.__repr__(value)
    except ValueError as err:  # Python writes no number of more than some thousand digits
        raise HookOptionError(f"a number cannot be written in a hook string: {err}.") from err
