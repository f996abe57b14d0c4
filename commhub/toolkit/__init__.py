"""What hooks that compress share. The core uses none of it; plugins import it from here. See README.md in this folder.

Every name is imported from its home when it is first asked for.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ._cast_all_reduce import CastAllReduce
    from ._cast_hook import CastHook
    from ._codec import Codec
    from ._cpp import cpp_library
    from ._feedback import ErrorFeedback
    from ._kernels import Kernel
    from ._per_bucket import PerBucket
    from ._rules import Rules
    from ._selection import Selection
    from ._two_step import TwoStep

__all__ = [
    "CastAllReduce",
    "CastHook",
    "Codec",
    "ErrorFeedback",
    "Kernel",
    "PerBucket",
    "Rules",
    "Selection",
    "TwoStep",
    "cpp_library",
]

_HOMES = {
    "CastAllReduce": "_cast_all_reduce",
    "CastHook": "_cast_hook",
    "Codec": "_codec",
    "ErrorFeedback": "_feedback",
    "Kernel": "_kernels",
    "PerBucket": "_per_bucket",
    "Rules": "_rules",
    "Selection": "_selection",
    "TwoStep": "_two_step",
    "cpp_library": "_cpp",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
