"""The frameworks that this package works with: which versions, and what to install where there is none."""

from __future__ import annotations

from importlib import import_module, metadata
from typing import Any, Final

from packaging.specifiers import SpecifierSet

from commhub import PluginError

BOUNDS: Final = {"accelerate": ">=1.15,<1.16", "transformers": ">=5.23,<5.24"}
"""The versions whose inner workings are known here; those of the extras in ``pyproject.toml``."""


def require(package: str) -> Any:
    """Import a framework.

    Raises:
        PluginError: if it is not installed, cannot be imported, or is of a version that is not known here.
    """
    advice = f"Install it: pip install 'commhub-accelerate[{package}]'."
    wanted = f"commhub-accelerate works with {package} {BOUNDS[package]}"
    try:
        found = metadata.version(package)
    except metadata.PackageNotFoundError:
        raise PluginError(f"{wanted}, and it is not installed. {advice}") from None
    if not SpecifierSet(BOUNDS[package]).contains(found, prereleases=True):
        raise PluginError(f"{wanted}, and {found} is installed. {advice}")
    try:
        return import_module(package)
    except Exception as err:
        raise PluginError(f"{package} {found} cannot be imported: {type(err).__name__}: {err}") from err
