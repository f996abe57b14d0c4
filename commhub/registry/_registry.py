"""The registry: what is installed, and what each name resolves to.

It joins the two floors of discovery: metadata says who claims a name, and only then the specs of that one
plugin are loaded. Listing loads all plugins, each apart.
"""

from __future__ import annotations

import threading
from types import MappingProxyType
from typing import TYPE_CHECKING

import attrs

from commhub._errors import PluginError
from commhub.registry import _index, _lookup

from ._hookstring import parse
from ._loading import load_specs

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ._index import Claim
    from ._lookup import Standing
    from ._spec import AveragerSpec, HookSpec

__all__ = ["HookInfo", "hooks", "info", "installed", "refresh", "specs_of"]

_loaded: dict[tuple[Claim, ...], _Loaded] = {}
_lock = threading.Lock()


@attrs.frozen(kw_only=True)
class HookInfo:
    """One claim to a name, as listed.

    Attributes:
        name: canonical.
        kind: ``"hook"`` or ``"averager"``.
        distribution: whose claim it is.
        version: the distribution's.
        status: ``"ok"``, ``"broken"``, ``"disabled"``, ``"conflict"``, ``"shadowed"`` or ``"incompatible"``.
        summary: one line; empty where there is no spec.
        error: why the status is not ``"ok"``, and what to do; else ``None``.
        spec: what the plugin declares; ``None`` where its specs were not or could not be loaded.
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
        """The row as ``commhub list --json`` prints it."""
        return {field: getattr(self, field) for field in _COLUMNS}


_COLUMNS = ("name", "kind", "distribution", "version", "status", "summary", "error")


def refresh() -> None:
    """Forget everything that was discovered; needed only where installed files were edited in place."""
    _index.refresh()
    with _lock:
        _loaded.clear()


def installed() -> tuple[HookInfo, ...]:
    """One row per claim, hooks and averagers alike, sorted by name and distribution.

    A broken plugin is a row that says why; nothing raises.
    """
    return tuple(_info(standing) for standing in _lookup.standings())


def hooks() -> Mapping[str, HookInfo]:
    """What each bare name resolves to, both kinds, sorted; unusable names are left out."""
    return MappingProxyType({row.name: row for row in installed() if row.status == "ok"})


def info(name: str) -> HookInfo:
    """The row of one name, alias or ``distribution:name``; a broken plugin's row says why.

    Raises:
        UnknownHookError: when nothing installed and enabled has that name.
        HookConflictError: when several distributions have it.
        PluginError: when what has it needs another version of commhub.
        HookOptionError: when it cannot be read.
    """
    text = parse(name)
    claim = _lookup.find(text.name, text.distribution)
    return next(_info(standing) for standing in _lookup.standings() if standing.claim == claim)


def _info(standing: Standing) -> HookInfo:
    claim, status, error = standing.claim, standing.status, standing.reason
    spec = None
    if status in {"ok", "shadowed", "conflict"}:
        try:
            spec = specs_of(claim)[claim.name]
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


def specs_of(claim: Claim) -> Mapping[str, HookSpec | AveragerSpec]:
    """The specs of the plugin behind a claim, by name; loaded once, and a failure is remembered too.

    Raises:
        PluginError: when they cannot be loaded.
    """
    siblings = _index.siblings(claim)
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
