"""commhub: gradient communication for data-parallel PyTorch, one hook per plugin.

This is the public face. Every name is imported from its home when it is first asked for, so that
`import commhub`, `commhub --help` and `commhub list` stay quick and never load torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from commhub._bucket import Bucket
    from commhub._cast_all_reduce import CastAllReduce
    from commhub._collectives import (
        AllGather,
        AllReduce,
        AllToAll,
        Broadcast,
        Collective,
        ReduceScatter,
        Subgroup,
    )
    from commhub._cpp import cpp_library
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
    from commhub._feedback import ErrorFeedback
    from commhub._kernels import Kernel
    from commhub._manual import manual
    from commhub._names import HookType
    from commhub._network import Network
    from commhub._per_bucket import PerBucket
    from commhub._plugins import hookimpl
    from commhub._protocols import Averager, Exchange, Hook, Setup
    from commhub._register import create, register, registration
    from commhub._registration import Registration
    from commhub._registry import HookInfo, hooks, info, installed
    from commhub._rules import Rules
    from commhub._spec import AveragerSpec, HookSpec, Option
    from commhub._state import State
    from commhub.drivers import simulate

__version__ = "0.1.0"

__all__ = [
    "AllGather",
    "AllReduce",
    "AllToAll",
    "Averager",
    "AveragerSpec",
    "Broadcast",
    "Bucket",
    "CastAllReduce",
    "CheckpointError",
    "Collective",
    "CommhubError",
    "ErrorFeedback",
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
    "Kernel",
    "Network",
    "Option",
    "PerBucket",
    "PluginError",
    "ReduceScatter",
    "Registration",
    "RegistrationError",
    "Rules",
    "Setup",
    "State",
    "Subgroup",
    "UnknownHookError",
    "cpp_library",
    "create",
    "hookimpl",
    "hooks",
    "info",
    "installed",
    "manual",
    "register",
    "registration",
    "simulate",
]

_HOMES = {
    "AllGather": "commhub._collectives",
    "AllReduce": "commhub._collectives",
    "AllToAll": "commhub._collectives",
    "Averager": "commhub._protocols",
    "AveragerSpec": "commhub._spec",
    "Broadcast": "commhub._collectives",
    "Bucket": "commhub._bucket",
    "CastAllReduce": "commhub._cast_all_reduce",
    "CheckpointError": "commhub._errors",
    "Collective": "commhub._collectives",
    "CommhubError": "commhub._errors",
    "ErrorFeedback": "commhub._feedback",
    "Exchange": "commhub._protocols",
    "Hook": "commhub._protocols",
    "HookConflictError": "commhub._errors",
    "HookError": "commhub._errors",
    "HookInfo": "commhub._registry",
    "HookMismatchError": "commhub._errors",
    "HookOptionError": "commhub._errors",
    "HookSpec": "commhub._spec",
    "HookTimeoutError": "commhub._errors",
    "HookType": "commhub._enum",
    "Kernel": "commhub._kernels",
    "Network": "commhub._network",
    "Option": "commhub._spec",
    "PerBucket": "commhub._per_bucket",
    "PluginError": "commhub._errors",
    "ReduceScatter": "commhub._collectives",
    "Registration": "commhub._registration",
    "RegistrationError": "commhub._errors",
    "Rules": "commhub._rules",
    "Setup": "commhub._protocols",
    "State": "commhub._state",
    "Subgroup": "commhub._collectives",
    "UnknownHookError": "commhub._errors",
    "cpp_library": "commhub._cpp",
    "create": "commhub._register",
    "hookimpl": "commhub._plugins",
    "hooks": "commhub._registry",
    "info": "commhub._registry",
    "installed": "commhub._registry",
    "manual": "commhub._manual",
    "register": "commhub._register",
    "registration": "commhub._register",
    "simulate": "commhub.drivers",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'commhub' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
