"""What one call may leave behind in a rank's process, and how the next one is kept from seeing it."""

import gc
import importlib
import os
import random
import sys
import warnings
from typing import Any

import attrs


@attrs.frozen(kw_only=True)
class Surroundings:
    """The parent's environment, as of the call: a monkeypatched variable or path holds in the ranks too."""

    environ: dict[str, str]
    path: list[str]
    folder: str

    @classmethod
    def here(cls) -> "Surroundings":
        """Those of the process that asks."""
        path = [os.path.abspath(entry) for entry in sys.path]
        return cls(environ=dict(os.environ), path=path, folder=os.getcwd())


_filters: list[Any] = []


def remember() -> None:
    """Note what a new process starts with."""
    _filters[:] = warnings.filters


def reset(surroundings: Surroundings) -> None:
    """Make this process's global settings what they are in a new one."""
    import torch
    from torch.distributed import set_debug_level_from_env  # type: ignore[attr-defined]

    os.environ.clear()
    os.environ.update(surroundings.environ)
    # Gloo listens on the address of the host's name by default, which containers often cannot resolve.
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo" if sys.platform == "linux" else "lo0")
    os.chdir(surroundings.folder)
    _set_path(surroundings.path)
    warnings.resetwarnings()
    warnings.filters.extend(_filters)  # type: ignore[attr-defined]

    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)
    torch.set_grad_enabled(True)
    torch.set_anomaly_enabled(False)
    torch.set_autocast_enabled("cpu", False)
    torch.use_deterministic_algorithms(False)
    set_debug_level_from_env()
    torch.manual_seed(0)
    random.seed(0)
    if sys.modules.get("numpy") is not None:
        sys.modules["numpy"].random.seed(0)


def _set_path(path: list[str]) -> None:
    """Take over ``path``; forget the modules that came from a folder that is no longer on it."""
    gone = tuple(os.path.join(entry, "") for entry in set(sys.path) - set(path) if entry)
    if sys.path != path:
        sys.path[:] = path
        forget_modules(gone)


def forget_modules(folders: tuple[str, ...]) -> None:
    """Forget the modules that came from these folders, and what import and commhub know of the path."""
    for name, module in list(sys.modules.items()):
        if folders and (getattr(module, "__file__", None) or "").startswith(folders):
            del sys.modules[name]
    importlib.invalidate_caches()
    for home in ("commhub.registry._index", "commhub.registry._registry"):
        if home in sys.modules:
            sys.modules[home].refresh()


def collect() -> None:
    """Let models and registrations of the last call die now, not during the next one."""
    gc.collect()
