"""The two packages in which Lightning comes, ``lightning`` and ``pytorch_lightning``, told apart by name alone.

Their classes are the same and not each other's, so everything here is made once for each. Importing this module
imports neither of them.
"""

from __future__ import annotations

from importlib import import_module, metadata, util
from typing import Any

import attrs
from packaging.specifiers import SpecifierSet

from commhub import PluginError

SUPPORTED = ">=2.6,<2.7"
"""The versions that this adapter was written for; the extras in its metadata say the same."""

_DISTRIBUTIONS = {"lightning": "lightning", "pytorch_lightning": "pytorch-lightning"}
_HOMES = {"lightning": "lightning.pytorch", "pytorch_lightning": "pytorch_lightning"}


@attrs.frozen(kw_only=True)
class Framework:
    """The classes of one of the packages that this adapter builds on.

    Attributes:
        callback: ``Callback``.
        ddp: ``DDPStrategy``.
        single: ``SingleDeviceStrategy``.
        registry: ``StrategyRegistry``, where strategies have names.
    """

    callback: type
    ddp: type
    single: type
    registry: Any


def is_installed(package: str) -> bool:
    """Whether ``package`` can be found, in whatever version; imports nothing."""
    return util.find_spec(package) is not None


def load(package: str) -> Framework:
    """Import ``package``, one of ``lightning`` and ``pytorch_lightning``.

    Raises:
        PluginError: if it is not installed, is of a version that this adapter does not know, or cannot be imported.
    """
    distribution, home = _DISTRIBUTIONS[package], _HOMES[package]
    install = f"pip install 'commhub-lightning[{distribution}]'"
    if not is_installed(package):
        raise PluginError(f"commhub-lightning: the package {package} is not installed here: {install}")
    try:
        version = metadata.version(distribution)
    except metadata.PackageNotFoundError as error:
        raise PluginError(f"commhub-lightning: {package} has no version in its metadata: {install}") from error
    if not SpecifierSet(SUPPORTED).contains(version, prereleases=True):
        raise PluginError(
            f"commhub-lightning works with {distribution} {SUPPORTED}, and {version} is installed: {install}"
        )
    try:
        strategies, callbacks = import_module(f"{home}.strategies"), import_module(f"{home}.callbacks")
    except Exception as error:
        raise PluginError(
            f"commhub-lightning: {package} {version} cannot be imported: {type(error).__name__}: {error}"
        ) from error
    return Framework(
        callback=callbacks.Callback,
        ddp=strategies.DDPStrategy,
        single=strategies.SingleDeviceStrategy,
        registry=strategies.StrategyRegistry,
    )
