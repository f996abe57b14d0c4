"""The registry: what is installed, what a name resolves to, and the way from a name to a hook.

It joins the two floors of discovery: metadata says who claims a name, and only then the specs of that one
plugin are loaded. Listing loads all plugins, each apart.
"""

from __future__ import annotations

import threading
from types import MappingProxyType
from typing import TYPE_CHECKING

import attrs

from commhub._errors import HookOptionError, PluginError, UnknownHookError

from . import _index, _lookup
from ._hookstring import parse
from ._loading import load_specs
from ._recipe import Choice, canonical_string, check_options

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ._index import Claim
    from ._lookup import Standing
    from ._spec import AveragerSpec, HookSpec

__all__ = ["HookInfo", "hooks", "info", "installed", "refresh", "resolve"]

_loaded: dict[tuple[Claim, ...], _Loaded] = {}
_lock = threading.Lock()


@attrs.frozen(kw_only=True)
class HookInfo:
    """One claim to a name, as listed.

    * `kind`: `"hook"` or `"averager"`.
    * `status`: `"ok"`, `"broken"`, `"disabled"`, `"conflict"`, `"shadowed"` or `"incompatible"`.
    * `error`: why the status is not `"ok"`, and what to do; else None.
    * `spec`: what the plugin declares; None where its specs were not or could not be loaded.
    """

    name: str
    kind: str
    distribution: str
    version: str
    status: str
    summary: str
    error: str | None
    spec: HookSpec | AveragerSpec | None

    def as_dict(self) -> dict[str, str | None]:
        """Return the row as `commhub list --json` prints it."""
        return {field: getattr(self, field) for field in _COLUMNS}


_COLUMNS = ("name", "kind", "distribution", "version", "status", "summary", "error")


def refresh() -> None:
    """Forget everything that was discovered; needed only where installed files were edited in place."""
    _index.refresh()
    with _lock:
        _loaded.clear()


def installed() -> tuple[HookInfo, ...]:
    """Return one row per claim, hooks and averagers alike, sorted by name and distribution.

    A broken plugin is a row that says why; nothing raises.
    """
    return tuple(_info(standing) for standing in _lookup.standings())


def hooks() -> Mapping[str, HookInfo]:
    """Return what each bare name resolves to, both kinds, sorted; unusable names are left out."""
    return MappingProxyType({row.name: row for row in installed() if row.status == "ok"})


def info(name: str) -> HookInfo:
    """Return the row of one name, alias or `distribution:name`; a broken plugin's row says why.

    Raises UnknownHookError, HookConflictError or PluginError when the name leads to no plugin that may be
    loaded.
    """
    text = parse(name)
    claim = _lookup.find(text.name, text.distribution)
    return next(_info(standing) for standing in _lookup.standings() if standing.claim == claim)


def resolve(name: str, options: Mapping[str, object] | None = None, kind: str | None = None) -> Choice:
    """Choose a hook or averager by name, `distribution:name` or hook string, and check its options.

    Loads the specs of the one plugin that owns the name. Raises UnknownHookError, HookConflictError,
    PluginError or HookOptionError; with `kind`, also UnknownHookError for a name of the other kind.
    """
    text = parse(name)
    claim = _lookup.find(text.name, text.distribution)
    if kind is not None and claim.kind != kind:
        raise UnknownHookError(f"{claim.name!r} of {claim.distribution} is of kind {claim.kind!r}, not {kind!r}.")
    spec = _specs(claim)[claim.name]
    where = f"{claim.name} ({claim.distribution} {claim.version})"
    options = options or {}
    if twice := sorted(set(options) & set(text.options)):
        raise HookOptionError(f"{where}: {', '.join(twice)} is given both in the hook string and apart.")
    given, effective = check_options(spec, where, {**text.options, **options})
    bare = _lookup.names().get(claim.name) == claim
    return Choice(
        spec=spec,
        distribution=claim.distribution,
        version=claim.version,
        given=MappingProxyType(given),
        options=MappingProxyType(effective),
        canonical=canonical_string(claim.name, None if bare else claim.distribution, given),
    )


def _info(standing: Standing) -> HookInfo:
    claim, status, error = standing.claim, standing.status, standing.reason
    spec = None
    if status in {"ok", "shadowed", "conflict"}:
        try:
            spec = _specs(claim)[claim.name]
        except PluginError as err:
            status, error = "broken", str(err)
    return HookInfo(
        name=claim.name,
        kind=claim.kind,
        distribution=claim.distribution,
        version=claim.version,
        status=status,
        summary=spec.summary if spec else "",
        error=error,
        spec=spec,
    )


def _specs(claim: Claim) -> Mapping[str, HookSpec | AveragerSpec]:
    """Return the specs of the plugin behind a claim, loaded once; a failure is remembered too."""
    siblings = tuple(
        other for other in _index.claims() if (other.distribution, other.module) == (claim.distribution, claim.module)
    )
    with _lock:
        loaded = _loaded.setdefault(siblings, _Loaded())
    return loaded.specs(siblings)


class _Loaded:
    """What one plugin declares, or why it cannot be used; a lock of its own, since an import may wait for another."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._found: Mapping[str, HookSpec | AveragerSpec] | PluginError | None = None

    def specs(self, siblings: tuple[Claim, ...]) -> Mapping[str, HookSpec | AveragerSpec]:
        with self._lock:
            if self._found is None:
                try:
                    self._found = load_specs(siblings)
                except PluginError as err:
                    self._found = err
            found = self._found
        if isinstance(found, PluginError):
            raise PluginError(str(found)) from found.__cause__
        return found
