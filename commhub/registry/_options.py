"""Checking the options that a user gives a hook against those that its plugin declares."""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs

from commhub._errors import HookOptionError

from ._hookstring import parse
from ._lookup import canonical
from ._spec import RESERVED

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ._spec import AveragerSpec, HookSpec

__all__ = ["check_options"]


def check_options(
    spec: HookSpec | AveragerSpec, where: str, given: Mapping[str, object]
) -> tuple[dict[str, object], dict[str, object]]:
    """Check the user's options against what the plugin declares.

    Args:
        spec: which declares them.
        where: what the error begins with: the hook, with its distribution and version.
        given: the user's options, by name.

    Returns:
        Those that were given, converted; and all options, with defaults and preset.

    Raises:
        HookOptionError: for an option that is unknown, preset, reserved, of the wrong type or none of the choices.
    """
    converted: dict[str, object] = {}
    for name, value in sorted(given.items()):
        option = spec.option(name)
        if option is None:
            raise HookOptionError(f"{where}: {_unknown(spec, name)}")
        if name in spec.preset:
            raise HookOptionError(
                f"{where}: {name} is preset to {spec.preset[name]!r} by this name and cannot be given."
            )
        try:
            converted[name] = option.convert(value)
        except ValueError as err:
            raise HookOptionError(f"{where}: {err}.") from err
        if option.type == "hook" and value is not None:
            converted[name] = _nested(str(converted[name]), f"{where}: {name}")
    defaults = {option.name: option.default for option in spec.options}
    return converted, {**defaults, **spec.preset, **converted}


def _nested(text: str, where: str) -> str:
    """A nested hook string in the one spelling that all ranks agree on."""
    try:
        nested = parse(text)
    except HookOptionError as err:
        raise HookOptionError(f"{where}: {err}") from err
    return str(attrs.evolve(nested, name=canonical(nested.name)))


def _unknown(spec: HookSpec | AveragerSpec, name: str) -> str:
    if name in RESERVED:
        return f"{name} is an argument of commhub.register, not an option of the {spec.kind}. Give it there."
    for option in spec.options:
        if name in option.known_as:
            return f"what is called {name!r} elsewhere is {option.name!r} here."
    free = [option.name for option in spec.options if option.name not in spec.preset]
    if not free:
        return f"there is no option {name!r}; it takes none."
    import difflib  # only failures pay for it

    close = difflib.get_close_matches(name, free, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return f"there is no option {name!r}.{hint} Its options are {', '.join(sorted(free))}."
