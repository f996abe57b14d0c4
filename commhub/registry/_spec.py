"""What a plugin declares about each hook and averager it offers.

A spec is plain data: it names the factory as text, so that listing, describing and completing names never
import the hook itself, nor torch. A malformed spec raises where it is written, and makes only its own plugin
"broken".
"""

from __future__ import annotations

import keyword
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Final

import attrs

from commhub._errors import HookOptionError, HookOptionTypeError
from commhub._printable import shown

from ._hookstring import literal

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["RESERVED", "AveragerSpec", "HookSpec", "Option", "is_name"]

RESERVED: Final = ("process_group", "optimizer", "scaler", "wire", "verify", "timeout", "state")
"""Arguments of ``register`` itself and of the core; no hook may declare an option of these names."""

_NAME: Final = re.compile(r"[a-z][a-z0-9_]*", re.ASCII)
_FACTORY: Final = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*", re.ASCII)
_TYPES: Final = (int, float, bool, str, dict)


def is_name(text: str) -> bool:
    """Whether a hook, an averager or an option can have this name."""
    return _NAME.fullmatch(text) is not None


def _is_name(_owner: object, _field: attrs.Attribute[str], value: object) -> None:
    if not isinstance(value, str) or not is_name(value):
        raise HookOptionError(
            f"{shown(value)} is not a name: write lowercase snake_case, a letter first, such as 'powersgd_rank2'."
        )


def _is_option_name(_owner: object, _field: attrs.Attribute[str], value: str) -> None:
    if value in RESERVED:
        raise HookOptionError(f"option {shown(value)} is reserved for the core ({', '.join(RESERVED)}): rename it.")
    if keyword.iskeyword(value):
        raise HookOptionError(f"option {shown(value)} is a Python keyword: rename it.")


def _is_option_type(_owner: object, _field: attrs.Attribute[type | str], value: object) -> None:
    if not any(value is known for known in _TYPES) and not (isinstance(value, str) and value == "hook"):
        raise HookOptionError(f"{shown(value)} is not an option's type: use int, float, bool, str, dict or 'hook'.")


def _is_sentence(_owner: object, field: attrs.Attribute[str], value: object) -> None:
    if not isinstance(value, str) or not value.strip() or "\n" in value:
        raise HookOptionError(f"{field.name} is {shown(value)}: write one line of text.")


def _is_text(_owner: object, field: attrs.Attribute[str], value: object) -> None:
    if not isinstance(value, str):
        raise HookOptionTypeError(f"{field.name} is {shown(value)}: write text.")


def _is_bool(_owner: object, field: attrs.Attribute[bool], value: object) -> None:
    if not isinstance(value, bool):
        raise HookOptionTypeError(f"{field.name} is {shown(value)}: write True or False.")


def _is_factory(_owner: object, _field: attrs.Attribute[str], value: object) -> None:
    if not isinstance(value, str) or not _FACTORY.fullmatch(value):
        raise HookOptionError(f"factory is {shown(value)}: write 'package.module:Class', as text.")


def _is_tolerance(_owner: object, _field: attrs.Attribute[float | None], value: object) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0:
        raise HookOptionError(f"tolerance is {shown(value)}: give a relative error >= 0, or None for no promise.")


def _words(value: object) -> tuple[str, ...]:
    if not isinstance(value, tuple | list) or not all(isinstance(word, str) for word in value):
        raise HookOptionTypeError(f"{shown(value)} is not a tuple of strings: mind the comma in ('optimizer',).")
    return tuple(map(str.__str__, value))


def _text(value: object) -> object:
    """Strip subclasses of ``str``, which answer with anything when they are printed, compared or cut."""
    return str.__str__(value) if isinstance(value, str) else value


def _plain(value: object) -> object:
    """The value as one of exactly Python's own types, so that it can always be printed, compared and written.

    Raises:
        HookOptionError: if it cannot be written in a hook string.
    """
    if isinstance(value, list | tuple):
        items = [_plain(item) for item in value]
        return items if isinstance(value, list) else tuple(items)
    if isinstance(value, dict):
        return {_plain(key): _plain(item) for key, item in value.items()}
    literal(value)
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return int.__int__(value)
    return float.__float__(value) if isinstance(value, float) else value


def _choices(value: Iterable[object]) -> tuple[object, ...]:
    if not isinstance(value, tuple | list):
        raise HookOptionTypeError(f"choices is {shown(value)}: give a tuple of values.")
    return tuple(map(_plain, value))


def _options(value: object) -> tuple[Option, ...]:
    if not isinstance(value, tuple | list) or not all(isinstance(x, Option) for x in value):
        raise HookOptionTypeError(f"options is {shown(value)}: give a tuple of commhub.Option.")
    return tuple(value)


@attrs.frozen(kw_only=True)
class Option:
    """One option of a hook: a keyword argument of its factory.

    Attributes:
        name: lowercase snake_case, and none of the names that ``register`` takes itself.
        type: ``int``, ``float`` (takes an int too), ``bool``, ``str``, ``dict``, or ``"hook"``: a nested hook string.
        default: the value when the option is not given. Where it is ``None``, that is allowed as a value.
        help: one line, for ``commhub info``.
        choices: the allowed values; empty means any value of the type.
        known_as: what others call it, such as PyTorch; who writes that is told this name.

    Raises:
        HookOptionError: if the declaration contradicts itself.
    """

    name: str = attrs.field(converter=_text, validator=[_is_name, _is_option_name])
    type: type | str = attrs.field(validator=_is_option_type)
    default: object = attrs.field(default=None, hash=False)
    help: str = attrs.field(default="", converter=_text, validator=_is_text)
    choices: tuple[object, ...] = attrs.field(default=(), converter=_choices)
    known_as: tuple[str, ...] = attrs.field(default=(), converter=_words)

    def __attrs_post_init__(self) -> None:
        for choice in self.choices:
            if not self._has_type(choice):
                raise HookOptionError(f"option {self.name!r} has the choice {shown(choice)}, not a {self.type_name}.")
        if self.default is not None:
            object.__setattr__(self, "default", _plain(self.convert(self.default)))

    @property
    def type_name(self) -> str:
        """The type as a reader writes it: ``int``, ``float``, ``bool``, ``str``, ``dict`` or ``hook``."""
        return self.type if isinstance(self.type, str) else self.type.__name__

    def convert(self, value: object) -> object:
        """The value as a plain one of this option's type.

        An int becomes a float where a float is asked for; a bool is no number, and text is neither.

        Raises:
            HookOptionError: when the type does not fit or the value is none of the choices.
        """
        if value is None and self.default is None:
            return None
        if not self._has_type(value):
            article = "an" if self.type_name == "int" else "a"
            nested = " string" if self.type == "hook" else ""
            raise HookOptionError(f"{self.name} is {shown(value)}, not {article} {self.type_name}{nested}")
        if self.choices and value not in self.choices:
            raise HookOptionError(f"{self.name} is {shown(value)}, none of {', '.join(map(repr, self.choices))}")
        return self._plain(value)

    def _has_type(self, value: object) -> bool:
        if isinstance(value, bool):
            return self.type is bool
        if self.type is float:
            return isinstance(value, int | float)
        return isinstance(value, str if isinstance(self.type, str) else self.type)

    def _plain(self, value: object) -> object:
        """Strip subclasses (an enum member, a NumPy float), whose repr would leak into hook strings."""
        if isinstance(value, str):
            return str.__str__(value)
        if isinstance(self.type, type) and not isinstance(value, bool):
            try:
                return self.type(value)
            except OverflowError:
                raise HookOptionError(f"{self.name} is {shown(value, 20)}, too large for a float") from None
        return value


def _preset(value: Mapping[str, object]) -> dict[str, object]:
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise HookOptionTypeError(f"{shown(value)} is no dict of options by name.")
    return {name: _plain(entry) for name, entry in dict(value).items()}


@attrs.frozen(kw_only=True)
class _Spec:
    """What hooks and averagers declare alike."""

    kind: ClassVar[str]

    name: str = attrs.field(converter=_text, validator=_is_name)
    summary: str = attrs.field(converter=_text, validator=_is_sentence)
    factory: str = attrs.field(converter=_text, validator=_is_factory)
    options: tuple[Option, ...] = attrs.field(default=(), converter=_options)
    preset: Mapping[str, object] = attrs.field(factory=dict, converter=_preset, hash=False)
    needs: tuple[str, ...] = attrs.field(default=(), converter=_words)
    devices: tuple[str, ...] = attrs.field(default=("cpu", "cuda"), converter=_words)
    sent_bytes: str = attrs.field(default="", converter=_text, validator=_is_text)
    reference: str = attrs.field(default="", converter=_text, validator=_is_text)
    example: Mapping[str, object] = attrs.field(factory=dict, converter=_preset, hash=False)

    def __attrs_post_init__(self) -> None:
        declared: dict[str, Option] = {}
        for option in self.options:
            if option.name in declared:
                raise HookOptionError(f"{self.kind} {self.name!r} declares the option {option.name!r} twice.")
            declared[option.name] = option
        object.__setattr__(self, "preset", self._converted("preset", self.preset, declared))
        if both := self.preset.keys() & self.example:
            raise HookOptionError(f"{self.kind} {self.name!r} presets {min(both)!r}, which its example cannot give.")
        object.__setattr__(self, "example", self._converted("example", self.example, declared))

    def _converted(self, field: str, values: Mapping[str, object], declared: Mapping[str, Option]) -> dict[str, object]:
        converted = {}
        for name, value in values.items():
            if name not in declared:
                raise HookOptionError(
                    f"{self.kind} {self.name!r}: its {field} has {name!r}, which is none of its options."
                )
            try:
                converted[name] = declared[name].convert(value)
            except ValueError as err:
                raise HookOptionError(
                    f"{self.kind} {self.name!r} has a value of the wrong type in {field}: {err}."
                ) from err
        return converted

    def option(self, name: str) -> Option | None:
        """The declared option of this name, or ``None``."""
        return next((option for option in self.options if option.name == name), None)


@attrs.frozen(kw_only=True)
class HookSpec(_Spec):
    """A hook, as its plugin declares it.

    Attributes:
        name: what users write; lowercase snake_case.
        summary: one line, for ``commhub list``.
        factory: ``"package.module:Class"``; imported at the first use, called with the options as keywords.
        options: what it takes, each an ``Option``.
        preset: options that this name fixes (``powersgd_rank2`` presets ``rank=2``); users cannot override them.
        needs: what must be given at register besides the model, such as ``"optimizer"``.
        devices: where its tensors may live.
        sent_bytes: the bytes that one rank sends per step for the gradient of one parameter, as a formula: Python
            arithmetic with ``min``, ``max``, ``ceil``, ``sqrt``, ``log2`` over ``p`` (ranks), ``h`` (ranks on one
            host), ``rows`` and ``cols`` of the matrix, ``numel``, ``itemsize``, and the options by name; a nested
            hook's name stands for its own bytes.
        reference: the paper or document that defines the method.
        example: options for the line that ``commhub info`` shows as an example, where the defaults would not do.
        exact: whether the result is the mean up to rounding in the gradient's dtype.
        agrees: whether the result is identical on all ranks, bit by bit.
        tolerance: the bound on the relative error of one step; ``None`` where no single step promises one.

    Raises:
        HookOptionError: when a field is malformed, an option is declared twice or a preset or example names no option.
        HookOptionError: and a TypeError too, when a field that takes a tuple was given something else.
    """

    kind: ClassVar[str] = "hook"

    exact: bool = attrs.field(default=False, validator=_is_bool)
    agrees: bool = attrs.field(default=True, validator=_is_bool)
    tolerance: float | None = attrs.field(default=None, validator=_is_tolerance)


@attrs.frozen(kw_only=True)
class AveragerSpec(_Spec):
    """An averager of parameters, as its plugin declares it; fields and errors are those of ``HookSpec``."""

    kind: ClassVar[str] = "averager"
