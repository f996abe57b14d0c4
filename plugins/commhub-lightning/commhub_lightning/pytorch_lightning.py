"""The same for the package ``pytorch_lightning``: its classes are others than those of ``lightning.pytorch``.

Importing this module imports that package, and raises a ``PluginError`` where it cannot be used.
"""

from __future__ import annotations

from ._classes import NAMES, classes, register_names

__all__ = ["CommHubCallback", "CommHubDDPStrategy"]  # noqa: F822 - __getattr__ has them


def __getattr__(name: str) -> object:
    if name in NAMES:
        return classes("pytorch_lightning")[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


register_names("pytorch_lightning")
