"""Values that no call is made for, and what a walk over public calls asks of each."""

import inspect
import time

import commhub


class Unspeakable:
    """Cannot be shown."""

    def __repr__(self):
        raise ValueError("no text")

    __str__ = __repr__


BAD = {
    "none": None,
    "minus": -1,
    "zero": 0,
    "nan": float("nan"),
    "infinite": float("inf"),
    "long": 9e9,
    "huge": 10**400,
    "true": True,
    "empty": "",
    "text": "no such thing",
    "surrogate": "\ud800",
    "bytes": b"\xff",
    "list": [],
    "nested": [[None]],
    "dict": {},
    "odd dict": {None: Unspeakable()},
    "type": int,
    "unspeakable": Unspeakable(),
}

OWN_WORD = ("unexpected keyword argument", "missing", "positional argument")
"""How Python itself refuses a wrong number of arguments, which may stay."""


def parameters(function):
    """The names of what a function is given, without ``self`` and what it takes by any name."""
    kinds = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    found = inspect.signature(function).parameters.values()
    return [one.name for one in found if one.kind not in kinds and one.name != "self"]


def complaint(name, function, given):
    """What is wrong with how a call ended: it works, raises a CommhubError with a text, and takes no long."""
    began = time.monotonic()
    try:
        function(**given)
    except commhub.CommhubError as error:
        if not str(error).encode("utf-8", "backslashreplace"):
            return f"{name}: no text"
    except Exception as error:
        if not (isinstance(error, TypeError) and any(word in str(error) for word in OWN_WORD)):
            return f"{name}: {type(error).__name__}: {str(error)[:150]}"
    return f"{name} took {time.monotonic() - began:.1f} s" if time.monotonic() - began > 5 else ""


def complaints(name, function, good):
    """All of them, over every parameter of a function and every bad value."""
    return [
        told
        for parameter in parameters(function)
        for kind, bad in BAD.items()
        if (told := complaint(f"{name}({parameter}={kind})", function, {**good, parameter: bad}))
    ]
