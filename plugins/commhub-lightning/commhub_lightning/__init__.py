"""commhub's hooks in Lightning: ``CommHubDDPStrategy``, ``CommHubCallback``, and ``strategy="ddp_commhub_fp16"``.

Importing this package imports ``lightning``, where that is installed, and gives the strategy of every installed hook a
name. For the package ``pytorch_lightning``, whose classes are others, import ``commhub_lightning.pytorch_lightning``.
"""

from __future__ import annotations

import warnings

from commhub import PluginError

from ._classes import NAMES, classes, register_names
from ._framework import is_installed

__all__ = ["CommHubCallback", "CommHubDDPStrategy"]


def __getattr__(name: str) -> object:
    if name in NAMES:
        return classes("lightning")[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


if is_installed("lightning"):
    try:
        register_names("lightning")
    except PluginError as error:
        warnings.warn(str(error), stacklevel=2)  # raised by what is used; the user may want pytorch_lightning
