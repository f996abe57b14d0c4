"""The public classes for one of the two packages, made once, and the strategies' names in its registry."""

from __future__ import annotations

import functools
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import commhub

from ._callback import HookedCallback
from ._framework import load
from ._strategy import HookedStrategy

if TYPE_CHECKING:
    from collections.abc import Mapping

NAMES = ("CommHubCallback", "CommHubDDPStrategy")
PREFIX = "ddp_commhub_"

_FACES = {"lightning": "commhub_lightning", "pytorch_lightning": "commhub_lightning.pytorch_lightning"}
"""Where users, and pickle, find the classes."""


@functools.cache
def classes(package: str) -> Mapping[str, Any]:
    """The classes by name.

    Raises:
        PluginError: if the package cannot be used.
    """
    framework = load(package)
    strategy = _made("CommHubDDPStrategy", package, (HookedStrategy, framework.ddp), {})
    callback = _made(
        "CommHubCallback",
        package,
        (HookedCallback, framework.callback),
        {"_ddp": framework.ddp, "_single": framework.single},
    )
    return MappingProxyType({"CommHubDDPStrategy": strategy, "CommHubCallback": callback})


def register_names(package: str) -> None:
    """Give each installed hook's strategy a name in the package's registry; loads no plugin's hook.

    Raises:
        PluginError: if the package cannot be used.
    """
    registry, strategy = load(package).registry, classes(package)["CommHubDDPStrategy"]
    for name, row in commhub.hooks().items():
        registry.register(f"{PREFIX}{name}", strategy, description=row.summary, override=True, hook=name)


def _made(name: str, package: str, bases: tuple[type, ...], members: dict[str, Any]) -> type:
    return type(name, bases, {**members, "__module__": _FACES[package], "__doc__": bases[0].__doc__})
