"""The extension points, and how one plugin's specs are loaded.

pluggy calls a plugin, but never finds one: discovery is the index's, which imports nothing. Each plugin is
loaded apart from all others, so that whatever is wrong with it becomes a PluginError of that plugin alone.
"""

from __future__ import annotations

from collections import Counter
from importlib import import_module
from typing import TYPE_CHECKING, Final

import pluggy

from commhub._errors import PluginError, described

from ._spec import AveragerSpec, HookSpec

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from ._index import Claim

__all__ = ["commhub_averagers", "commhub_hooks", "hookimpl", "load_specs"]

_PROJECT: Final = "commhub"
_SPECS: Final = {"commhub_hooks": HookSpec, "commhub_averagers": AveragerSpec}

hookspec: Final = pluggy.HookspecMarker(_PROJECT)
hookimpl: Final = pluggy.HookimplMarker(_PROJECT)
"""Marks a plugin's ``commhub_hooks`` and ``commhub_averagers``."""


@hookspec
def commhub_hooks() -> Iterable[HookSpec]:  # type: ignore[empty-body]  # plugins answer
    """Return the hooks that this plugin offers: one ``HookSpec`` per entry point in ``commhub.hooks.v1``."""


@hookspec
def commhub_averagers() -> Iterable[AveragerSpec]:  # type: ignore[empty-body]  # plugins answer
    """Return the averagers that this plugin offers: one spec per entry point in ``commhub.averagers.v1``."""


def load_specs(claims: Iterable[Claim]) -> Mapping[str, HookSpec | AveragerSpec]:
    """Import one spec module.

    Args:
        claims: all the claims that point at it.

    Returns:
        Its specs, by name.

    Raises:
        PluginError: from the original, for anything that goes wrong in the plugin, SystemExit included, and when the
            specs are not the ones that the entry points announce.
    """
    claims = tuple(claims)
    one = claims[0]
    try:
        specs = _ask(one.module)
        _compare(specs, claims)
    except KeyboardInterrupt:
        raise
    except BaseException as err:
        reason = " ".join(described(err).split())
        raise PluginError(
            f"{one.distribution} {one.version} cannot be used: loading {one.module} failed with {reason}. "
            f"Repair, upgrade or uninstall {one.distribution}, or set COMMHUB_DISABLE={one.distribution}."
        ) from err
    return {spec.name: spec for spec in specs}


def _ask(module: str) -> list[HookSpec | AveragerSpec]:
    """Import the spec module and collect what its implementations return."""
    if ":" in module:
        raise ValueError(f"the entry point must name a module, not {module!r}")
    manager = pluggy.PluginManager(_PROJECT)
    manager.add_hookspecs(import_module(__name__))
    manager.register(import_module(module), name=module)
    manager.check_pending()
    specs: list[HookSpec | AveragerSpec] = []
    for point, kind in _SPECS.items():
        for answer in getattr(manager.hook, point)():
            if not isinstance(answer, list | tuple) or not all(isinstance(spec, kind) for spec in answer):
                raise TypeError(f"{point} returned {answer!r}, not a list of {kind.__name__}")
            specs.extend(answer)
    return specs


def _compare(specs: Iterable[HookSpec | AveragerSpec], claims: Iterable[Claim]) -> None:
    """Refuse specs that differ from the entry points: a name would be listed but unusable, or hidden."""
    declared = Counter(f"{spec.kind} {spec.name}" for spec in specs)
    announced = Counter(f"{claim.kind} {claim.name}" for claim in claims)
    if missing := sorted((announced - declared).elements()):
        raise LookupError(f"the entry points announce {', '.join(missing)}, the specs do not")
    if extra := sorted((declared - announced).elements()):
        raise LookupError(f"the specs declare {', '.join(extra)}, the entry points do not")
