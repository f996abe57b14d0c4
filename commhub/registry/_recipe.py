"""A hook or averager that has been chosen, with its options checked: everything short of importing it.

`load` and `create` are the only ways from a name to a plugin's own code, so its failures get a name here.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, cast

import attrs

from commhub._errors import CommhubError, HookOptionError, PluginError, described

from ._hookstring import HookString, parse
from ._lookup import canonical
from ._spec import RESERVED

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from ._spec import AveragerSpec, HookSpec

__all__ = ["Choice", "canonical_string", "check_options"]


@attrs.frozen(kw_only=True)
class Choice:
    """What a name and its options lead to.

    `given` are the user's options, checked and converted; `options` adds defaults and preset. `canonical`
    is the hook string that leads here again, with a distribution only where the bare name would not.
    """

    spec: HookSpec | AveragerSpec
    distribution: str
    version: str
    given: Mapping[str, object]
    options: Mapping[str, object]
    canonical: str

    @property
    def name(self) -> str:
        """The hook's canonical name."""
        return self.spec.name

    @property
    def kind(self) -> str:
        """`"hook"` or `"averager"`."""
        return self.spec.kind

    def __str__(self) -> str:
        return f"{self.name} ({self.distribution} {self.version})"

    def load(self) -> Callable[..., object]:
        """Import the factory.

        Raises PluginError, from the original, when it cannot be imported or is not callable.
        """
        module, _, attribute = self.spec.factory.partition(":")
        try:
            factory = getattr(import_module(module), attribute)
        except KeyboardInterrupt:
            raise
        except BaseException as err:
            raise PluginError(
                f"{self}: its factory {self.spec.factory} cannot be imported: {described(err)}. "
                f"Repair, upgrade or uninstall {self.distribution}."
            ) from err
        if not callable(factory):
            raise PluginError(f"{self}: its factory {self.spec.factory} is {factory!r}, not a callable.")
        return cast("Callable[..., object]", factory)

    def create(self) -> Any:
        """Return a new instance.

        Raises HookOptionError when the factory refuses its options with TypeError or ValueError, and
        PluginError when it cannot be imported or fails in another way. Errors of commhub's own pass
        unchanged.
        """
        factory = self.load()
        try:
            return factory(**self.options)
        except CommhubError:
            raise
        except (TypeError, ValueError) as err:
            raise HookOptionError(f"{self}: {err}") from err
        except Exception as err:
            raise PluginError(f"{self}: its factory failed with {described(err)}.") from err


def check_options(
    spec: HookSpec | AveragerSpec, where: str, given: Mapping[str, object]
) -> tuple[dict[str, object], dict[str, object]]:
    """Return the user's options converted, and all options with defaults and preset.

    Raises HookOptionError, beginning with `where`, for an option that is unknown, preset, reserved, of the
    wrong type or none of the choices.
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
    """Return a nested hook string in the one spelling that all ranks agree on."""
    try:
        nested = parse(text)
    except HookOptionError as err:
        raise HookOptionError(f"{where}: {err}") from err
    return str(attrs.evolve(nested, name=canonical(nested.name)))


def _unknown(spec: HookSpec | AveragerSpec, name: str) -> str:
    if name in RESERVED:
        return f"{name} is an argument of commhub.register, not an option of the {spec.kind}. Give it there."
    free = [option.name for option in spec.options if option.name not in spec.preset]
    if not free:
        return f"there is no option {name!r}; it takes none."
    import difflib  # only failures pay for it

    close = difflib.get_close_matches(name, free, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return f"there is no option {name!r}.{hint} Its options are {', '.join(sorted(free))}."


def canonical_string(name: str, distribution: str | None, given: Mapping[str, object]) -> str:
    """Return the canonical hook string; raises HookOptionError for a value that cannot be written."""
    return str(HookString(name=name, distribution=distribution, options=given))
