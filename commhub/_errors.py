"""Every error that commhub raises on purpose, as one tree.

Each class also derives from the builtin that fits it, so that code which knows nothing of commhub still
catches it. A message says what happened, where (hook, distribution, version, and in training bucket, step,
rank) and what to do; what it quotes of others' text is made printable (``described``).
"""

from ._printable import described as described

__all__ = [
    "CheckpointError",
    "CommhubError",
    "HookConflictError",
    "HookError",
    "HookMismatchError",
    "HookOptionError",
    "HookTimeoutError",
    "PluginError",
    "RegistrationError",
    "UnknownHookError",
]


class CommhubError(Exception):
    """The root: ``except commhub.CommhubError`` catches whatever commhub raises on purpose."""


class UnknownHookError(CommhubError, LookupError):
    """No installed and enabled plugin offers this name."""


class HookConflictError(CommhubError, LookupError):
    """Several distributions offer this name and none of them is preferred; ``distribution:name`` decides."""


class HookOptionError(CommhubError, ValueError):
    """What was given is malformed, unknown, of the wrong type or out of range.

    A hook string, an option of a hook, a field of a spec, a schedule, a network, what is simulated or tested.
    """


class HookMismatchError(CommhubError, RuntimeError):
    """The ranks of a group do not agree on hook, version, options, wire or layout."""


class PluginError(CommhubError, ImportError):
    """A plugin is installed but cannot be used; the cause is the original exception."""


class CheckpointError(CommhubError, ValueError):
    """A hook's state cannot be saved or loaded; the text names the file, if it lies in one, and the reason."""


class RegistrationError(CommhubError, RuntimeError):
    """A hook cannot be registered on this model, or a registration cannot do what was asked of it."""


class HookError(CommhubError, RuntimeError):
    """A hook failed in training; its text ends with the original error, which is also its cause."""


class HookTimeoutError(HookError, TimeoutError):
    """A hook's communication did not finish in time, for example because a peer is gone."""


class HookOptionTypeError(HookOptionError, TypeError):
    """A value of the wrong kind: what is no hook where one belongs, for instance."""


class StateNameError(CommhubError, KeyError):
    """A hook asks for the memory of a parameter that the model does not have."""

    __str__ = Exception.__str__
