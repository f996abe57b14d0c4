"""The extension points, and how one plugin's specs are loaded.

pluggy calls a plugin, but never finds one: discovery is the index's, which imports nothing. Each plugin is
loaded apart from all others, so that whatever is wrong with it becomes a PluginError of that plugin alone.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections import Counter
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Final

import attrs
import pluggy

from commhub._errors import PluginError, described
from commhub._printable import shown, visible

from ._spec import AveragerSpec, HookSpec, Option

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from ._index import Claim

__all__ = ["commhub_averagers", "commhub_hooks", "hookimpl", "load_specs", "put_back"]

_PROJECT: Final = "commhub"
_NAMED: Final = 10
"""Names that an error lists; a plugin may declare any number."""
_SPECS: Final = {"commhub_hooks": HookSpec, "commhub_averagers": AveragerSpec}
_FIELDS: Final = {kind: tuple(field.name for field in attrs.fields(kind)) for kind in (*_SPECS.values(), Option)}

hookspec: Final = pluggy.HookspecMarker(_PROJECT)
hookimpl: Final = pluggy.HookimplMarker(_PROJECT)
"""Marks a plugin's ``commhub_hooks`` and ``commhub_averagers``."""


@hookspec
def commhub_hooks() -> Iterable[HookSpec]:  # type: ignore[empty-body]  # plugins answer
    """Return the hooks that this plugin offers: one ``HookSpec`` per entry point in ``commhub.hooks.v1``."""


@hookspec
def commhub_averagers() -> Iterable[AveragerSpec]:  # type: ignore[empty-body]  # plugins answer
    """Return the averagers that this plugin offers: one spec per entry point in ``commhub.averagers.v1``."""


_POINTS: Final = ModuleType("the extension points, and nothing else that pluggy would have to look at")
_POINTS.commhub_hooks = commhub_hooks  # type: ignore[attr-defined]
_POINTS.commhub_averagers = commhub_averagers  # type: ignore[attr-defined]


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
        with put_back():
            answers = _ask(one.module)
            _compare(answers, claims)
            specs = {spec.name: spec for spec in map(_own, answers)}
    except KeyboardInterrupt:
        raise
    except BaseException as err:
        reason = " ".join(described(err).split())
        module = visible(one.module)
        raise PluginError(
            f"{one.distribution} {one.version} cannot be used: loading {module} failed with {reason}. "
            f"Repair, upgrade or uninstall {one.distribution}, or set COMMHUB_DISABLE={one.distribution}."
        ) from err
    return specs


class _Manager(pluggy.PluginManager):
    """Looks at what a module defines, not at the names that every module has: half the time of loading a plugin."""

    def parse_hookimpl_opts(self, plugin: object, name: str) -> pluggy.HookimplOpts | None:
        return None if name.startswith("__") else super().parse_hookimpl_opts(plugin, name)


@contextlib.contextmanager
def put_back() -> Iterator[None]:
    """Afterwards what stood on ``sys.path`` stands there again, and the working directory is what it was.

    Without them no other plugin could be imported. What a plugin adds to the path stays, after the rest.
    """
    path, here = list(sys.path), _here()
    try:
        yield
    finally:
        if sys.path != path:
            added = [entry for entry in sys.path if isinstance(entry, str) and entry not in path]
            if [entry for entry in sys.path if entry in path] != path:
                sys.path = path + added
        if here is not None and _here() != here:
            with contextlib.suppress(OSError):
                os.chdir(here)


def _here() -> str | None:
    try:
        return os.getcwd()
    except OSError:  # it was deleted
        return None


def _own(spec: HookSpec | AveragerSpec) -> HookSpec | AveragerSpec:
    """The spec anew, checked: a plugin may have made a subclass, or changed what it had made, into anything."""
    kind: type[HookSpec | AveragerSpec] = _SPECS[f"commhub_{spec.kind}s"]
    values = {name: getattr(spec, name) for name in _FIELDS[kind]}
    values["options"] = [Option(**{name: getattr(x, name) for name in _FIELDS[Option]}) for x in values["options"]]
    return kind(**values)


def _ask(module: str) -> list[HookSpec | AveragerSpec]:
    """Import the spec module and collect what its implementations return."""
    if ":" in module:
        raise ValueError(f"the entry point must name a module, not {module!r}")
    manager = _Manager(_PROJECT)
    manager.add_hookspecs(_POINTS)
    manager.register(import_module(module), name=module)
    manager.check_pending()
    specs: list[HookSpec | AveragerSpec] = []
    for point, kind in _SPECS.items():
        for answer in getattr(manager.hook, point)():
            if not isinstance(answer, list | tuple) or not all(isinstance(spec, kind) for spec in answer):
                raise TypeError(f"{point} returned {shown(answer)}, not a list of {kind.__name__}")
            specs.extend(answer)
    return specs


def _compare(specs: Iterable[HookSpec | AveragerSpec], claims: Iterable[Claim]) -> None:
    """Refuse specs that differ from the entry points: a name would be listed but unusable, or hidden."""
    declared = Counter(f"{spec.kind} {spec.name}" for spec in specs)
    announced = Counter(f"{claim.kind} {claim.name}" for claim in claims)
    if missing := sorted((announced - declared).elements()):
        raise LookupError(f"the entry points announce {_few(missing)}, the specs do not")
    if extra := sorted((declared - announced).elements()):
        raise LookupError(f"the specs declare {_few(extra)}, the entry points do not")


def _few(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return f"{', '.join(names[:_NAMED])}{more}"
