"""The index: which distribution claims which name, read from installed metadata alone.

Nothing of a plugin is imported here. A distribution found twice on the path counts once, the first, as with
``import``; damaged metadata of one package hides that package and no other.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import sys
import threading
from typing import TYPE_CHECKING, Final, Literal

import attrs
import importlib_metadata

from ._hookstring import canonical_distribution, canonical_name
from ._metadata import Metadata, installed_name, points

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator

    from importlib_metadata import IDistribution

__all__ = ["GROUPS", "Claim", "Kind", "Offer", "claims", "offers", "refresh", "siblings"]

Kind = Literal["hook", "averager"]

GROUPS: Final[dict[str, Kind]] = {"commhub.hooks.v1": "hook", "commhub.averagers.v1": "averager"}
"""Entry-point groups; the number is the major version of the plugin API."""

_cache: dict[object, tuple[Claim, ...]] = {}
_plugins: dict[tuple[str, str], tuple[Claim, ...]] = {}
"""By distribution and spec module, the claims that point there."""
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

    @property
    def plugin(self) -> tuple[str, str]:
        """The distribution and the spec module, which are loaded and fail together."""
        return self.distribution, self.module


@attrs.frozen
class Offer:
    """An entry point of any other group of commhub's.

    Attributes:
        distribution: normalised.
        point: its name.
        value: what it leads to.
    """

    distribution: str
    point: str
    value: str


def claims() -> tuple[Claim, ...]:
    """Every claim, sorted; read again whenever a directory on ``sys.path`` has changed."""
    with _lock:
        paths = _paths()
        key = tuple((path, _changed(path)) for path in paths)
        found = _cache.get(key)
        if found is None:
            refresh()
            found = _cache[key] = tuple(sorted(_read(paths)))
            for claim in found:
                _plugins[claim.plugin] = (*_plugins.get(claim.plugin, ()), claim)
        return found


def offers(group: str) -> list[Offer]:
    """Every entry point of a group, sorted by distribution and name. Reads all metadata anew."""
    with _lock:
        found = [
            Offer(name, point, value)
            for _, name, offered in _announced(_paths(), {group})
            for _, point, value in offered
        ]
    return sorted(found, key=lambda offer: (offer.distribution, offer.point))


def siblings(claim: Claim) -> tuple[Claim, ...]:
    """All claims that point at the same spec module of the same distribution, the given one included.

    The directories are looked at only where the claim is none of those that were read last, so that asking this for
    each of many claims costs little.
    """
    with _lock:
        found = _plugins.get(claim.plugin, ())
        if claim not in found:
            claims()
            found = _plugins.get(claim.plugin, ())
        return found


def refresh() -> None:
    """Forget what was read, for changes that leave no trace in a directory's time."""
    with _lock:
        _cache.clear()
        _plugins.clear()
        importlib.invalidate_caches()


def _search_path() -> list[str]:
    return sys.path


def _changed(path: str) -> int:
    try:
        return os.stat(path or ".").st_mtime_ns
    except OSError:
        return 0


def _paths() -> list[str]:
    return [path for path in _search_path() if isinstance(path, str) and "\0" not in path]


def _read(paths: list[str]) -> Iterator[Claim]:
    why: Final = functools.lru_cache(functools.partial(_incompatible, core=_core_version()))
    for found, name, offered in _announced(paths, GROUPS):
        with contextlib.suppress(Exception):  # one package's damage is not the others'
            yield from _claims_of(found, name, offered, why)


def _announced(
    paths: list[str], groups: Collection[str]
) -> Iterator[tuple[IDistribution, str, list[tuple[str, str, str]]]]:
    """Each distribution with entry points in these groups, its name, and group, name and value of each of them."""
    seen = set()
    for found in importlib_metadata.distributions(path=paths):
        try:
            name = installed_name(found)
            if name in seen:
                continue
            seen.add(name)
            text = found.read_text("entry_points.txt") or ""
            offered = points(text, groups) if any(group in text for group in groups) else []
        except Exception:  # noqa: BLE001, S112 - the same
            continue
        if offered:
            yield found, name, offered


def _claims_of(
    found: IDistribution,
    name: str,
    offers: list[tuple[str, str, str]],
    why: Callable[[tuple[str, ...]], str | None],
) -> list[Claim]:
    """What one distribution offers; one whose metadata cannot be had, or misses its version, is incompatible."""
    damage = None
    try:
        said = Metadata.of(found)
    except ValueError:
        said, damage = Metadata(None, None, ()), "its metadata is not UTF-8"
    if said.name not in {None, name}:
        return []  # a folder that was renamed, such as pip does while it uninstalls
    damage = damage or said.damage()
    return [
        Claim(
            name=canonical_name(point),
            distribution=name,
            kind=GROUPS[group],
            module=module,
            version=said.version or "",
            location=str(found.locate_file("")),
            incompatible=damage or why(said.requires),
        )
        for group, point, module in offers
    ]


def _core_version() -> str:
    try:
        return importlib_metadata.version("commhub")
    except importlib_metadata.PackageNotFoundError:  # run from a source tree
        from commhub._version import __version__

        return __version__


def _incompatible(requires: tuple[str, ...], core: str) -> str | None:
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
