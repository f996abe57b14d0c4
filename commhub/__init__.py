"""commhub: gradient communication for data-parallel PyTorch, one hook per plugin.

This is the public face. Every name is imported from its home when it is first asked for, so that
``import commhub``, ``commhub --help`` and ``commhub list`` stay quick and never load torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from commhub._version import __version__ as __version__

if TYPE_CHECKING:
    from commhub import toolkit as toolkit
    from commhub._errors import (
        CheckpointError,
        CommhubError,
        HookConflictError,
        HookError,
        HookMismatchError,
        HookOptionError,
        HookTimeoutError,
        PluginError,
        RegistrationError,
        UnknownHookError,
    )
    from commhub.drivers._network import Network
    from commhub.drivers._simulator import simulate
    from commhub.protocol._bucket import Bucket
    from commhub.protocol._collectives import (
        AllGather,
        AllReduce,
        AllToAll,
        Broadcast,
        Collective,
        ReduceScatter,
        Subgroup,
    )
    from commhub.protocol._hook import Averager, Exchange, Hook, Scatterer
    from commhub.protocol._relay import relay
    from commhub.protocol._setup import Setup
    from commhub.protocol._state import State
    from commhub.registry._documented_names import HookType
    from commhub.registry._loading import hookimpl
    from commhub.registry._models import ModelSpec
    from commhub.registry._registry import HookInfo, hooks, info, installed
    from commhub.registry._spec import AveragerSpec, HookSpec, Option
    from commhub.training._manual import manual
    from commhub.training._register import checked, create, register, registration
    from commhub.training._registration import Registration
    from commhub.training.attachments._comm_hook import comm_hook

__all__ = [
    "AllGather",
    "AllReduce",
    "AllToAll",
    "Averager",
    "AveragerSpec",
    "Broadcast",
    "Bucket",
    "CheckpointError",
    "Collective",
    "CommhubError",
    "Exchange",
    "Hook",
    "HookConflictError",
    "HookError",
    "HookInfo",
    "HookMismatchError",
    "HookOptionError",
    "HookSpec",
    "HookTimeoutError",
    "HookType",
    "ModelSpec",
    "Network",
    "Option",
    "PluginError",
    "ReduceScatter",
    "Registration",
    "RegistrationError",
    "Scatterer",
    "Setup",
    "State",
    "Subgroup",
    "UnknownHookError",
    "checked",
    "comm_hook",
    "create",
    "hookimpl",
    "hooks",
    "info",
    "installed",
    "manual",
    "register",
    "registration",
    "relay",
    "simulate",
    "toolkit",
]

_HOMES = {
    "AllGather": "commhub.protocol._collectives",
    "AllReduce": "commhub.protocol._collectives",
    "AllToAll": "commhub.protocol._collectives",
    "Averager": "commhub.protocol._hook",
    "AveragerSpec": "commhub.registry._spec",
    "Broadcast": "commhub.protocol._collectives",
    "Bucket": "commhub.protocol._bucket",
    "CheckpointError": "commhub._errors",
    "Collective": "commhub.protocol._collectives",
    "CommhubError": "commhub._errors",
    "Exchange": "commhub.protocol._hook",
    "Hook": "commhub.protocol._hook",
    "HookConflictError": "commhub._errors",
    "HookError": "commhub._errors",
    "HookInfo": "commhub.registry._registry",
    "HookMismatchError": "commhub._errors",
    "HookOptionError": "commhub._errors",
    "HookSpec": "commhub.registry._spec",
    "HookTimeoutError": "commhub._errors",
    "HookType": "commhub.registry._enum",
    "ModelSpec": "commhub.registry._models",
    "Network": "commhub.drivers._network",
    "Option": "commhub.registry._spec",
    "PluginError": "commhub._errors",
    "ReduceScatter": "commhub.protocol._collectives",
    "Registration": "commhub.training._registration",
    "RegistrationError": "commhub._errors",
    "Scatterer": "commhub.protocol._hook",
    "Setup": "commhub.protocol._setup",
    "State": "commhub.protocol._state",
    "Subgroup": "commhub.protocol._collectives",
    "UnknownHookError": "commhub._errors",
    "checked": "commhub.training._register",
    "comm_hook": "commhub.training.attachments._comm_hook",
    "create": "commhub.training._register",
    "hookimpl": "commhub.registry._loading",
    "hooks": "commhub.registry._registry",
    "info": "commhub.registry._registry",
    "installed": "commhub.registry._registry",
    "manual": "commhub.training._manual",
    "register": "commhub.training._register",
    "registration": "commhub.training._register",
    "relay": "commhub.protocol._relay",
    "simulate": "commhub.drivers._simulator",
    "toolkit": "commhub.toolkit",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'commhub' has no attribute {name!r}")
    home = import_module(_HOMES[name])
    return home if home.__name__ == f"commhub.{name}" else getattr(home, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
