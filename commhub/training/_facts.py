"""What ranks compare before a hook works on a target: the hook, its options and packages, and the model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from commhub._version import __version__
from commhub.protocol._wire import short_dtype

if TYPE_CHECKING:
    import torch

    from commhub.registry._recipe import Recipe

    from ._target import Target


def facts_of(target: Target, chosen: Recipe, wire: torch.dtype | None) -> dict[str, Any]:
    """What all ranks must have alike, by what it is called in errors."""
    described = [[name, list(target.shape(name, p)), str(p.dtype), list(p.stride())] for name, p in target.parameters]
    return {
        "hook": chosen.name,
        "version": f"{chosen.distribution} {chosen.version}".strip(),
        **{f"version of {name}": version for name, version in _others(chosen).items()},
        **{f"option {key}": _shown(value) for key, value in chosen.options.items()},
        "wire": None if wire is None else short_dtype(wire),
        "parameters": described,
        **target.traits,
    }


def _others(chosen: Recipe) -> dict[str, str]:
    """The versions of what else takes part: the core, and the packages of nested hooks."""
    return {n: v for n, v in {**chosen.packages(), "commhub": __version__}.items() if n != chosen.distribution}


def _shown(value: object) -> str:
    """An option's value as ranks compare it: equal dicts alike, in whatever order they were written."""
    return repr(dict(sorted(value.items(), key=repr)) if isinstance(value, dict) else value)
