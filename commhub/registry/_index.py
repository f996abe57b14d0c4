"""The index: which distribution claims which name, read from installed metadata alone.

Nothing of a plugin is imported here. A distribution found twice on the path counts once, the first, as with
``import``; damaged metadata of one package hides that package and no other.
"""

from __future__ import annotations

import importlib
import os
import sys
import threading
from typing import TYPE_CHECKING, Final, Literal

import attrs
import importlib_metadata

from ._hookstring import canonical_distribution, canonical_name

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["GROUPS", "Claim", "Kind", "claims", "refresh"]

Kind = Literal["hook", "averager"]

GROUPS: Final[dict[str, Kind]] = {"commhub.hooks.v1": "hook", "commhub.averagers.v1": "averager"}
"""Entry-point groups; the number is the major version of the plugin API."""

_cache: dict[object, tuple[Claim, ...]] = {}
_lock = threading.RLock()
"""One thread reads or forgets at a time: ``importlib.invalidate_caches`` itself fails when two threads call it."""


@attrs.frozen(order=True)
class Claim:
    """One entry point: a distribution says that it offers a name.

    Attributes:
        name: canonical.
        distribution: normalised.
        kind: ``"hook"`` or ``"averager"``.
        module: the spec module.
        version: the distribution's.
        location: where the distribution was found.
        incompatible: why it cannot work with this version of commhub; else ``None``.
    """

    name: str
    distribution: str
    kind: Kind
    module: str
    version: str
    location: str
    incompatible: str | None


def claims() -> tuple[Claim, ...]:
    """Every claim, sorted; read again whenever a directory on ``sys.path`` has changed."""
    with _lock:
        key = tuple((path, _changed(path)) for path in _search_path())
        found = _cache.get(key)
        if found is None:
            refresh()
            found = _cache[key] = tuple(sorted(_read()))
        return found


def refresh() -> None:
    """Forget what was read, for changes that leave no trace in a directory's time."""
    with _lock:
        _cache.clear()
        importlib.invalidate_caches()


def _search_path() -> list[str]:
    return sys.path


def _changed(path: str) -> int:
    try:
        return os.stat(path or ".").st_mtime_ns
    except OSError:
        return 0


def _read() -> Iterator[Claim]:
    core = _core_version()
    for name in sorted(_offering()):
        try:
            # By name, because the first of that name decides even if only a later one has entry points.
            found = next(iter(importlib_metadata.distributions(name=name, path=_search_path())))
            points = [point for point in found.entry_points if point.group in GROUPS]
            reason = _incompatible(found.requires or [], core)
            version = found.version
        except Exception:  # noqa: BLE001, S112 - one package's damage is not the others'
            continue
        for point in points:
            yield Claim(
                name=canonical_name(point.name),
                distribution=name,
                kind=GROUPS[point.group],
                module=point.value,
                version=version,
                location=str(found.locate_file("")),
                incompatible=reason,
            )


def _offering() -> set[str]:
    """The distributions that mention one of the groups; parsing only these keeps the index quick."""
    names = set()
    for found in importlib_metadata.distributions(path=_search_path()):
        try:
            text = found.read_text("entry_points.txt") or ""
            if any(group in text for group in GROUPS):
                names.add(canonical_distribution(found.name))
        except Exception:  # noqa: BLE001, S112 - as above
            continue
    return names


def _core_version() -> str:
    try:
        return importlib_metadata.version("commhub")
    except importlib_metadata.PackageNotFoundError:  # run from a source tree
        from commhub._version import __version__

        return __version__


def _incompatible(requires: list[str], core: str) -> str | None:
    """Why this core is outside the declared range, or ``None``."""
    for line in requires:
        if not line.lower().startswith("commhub"):
            continue  # not parsed: packaging is slow to import and most lines are other packages
        from packaging.requirements import InvalidRequirement, Requirement

        try:
            needed = Requirement(line)
        except InvalidRequirement:
            return f"its requirement {line!r} cannot be read"
        if canonical_distribution(needed.name) != "commhub":
            continue
        if needed.marker is not None and not needed.marker.evaluate({"extra": ""}):
            continue
        if not needed.specifier.contains(core, prereleases=True):
            return f"it needs commhub{needed.specifier}, this is commhub {core}"
    return None
