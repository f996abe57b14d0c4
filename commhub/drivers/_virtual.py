"""What ``simulate`` is given, looked at before anything runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from commhub._errors import HookOptionError, HookOptionTypeError
from commhub._printable import shown

Gradients = Sequence[Sequence[Tensor]] | Callable[[int, int], Sequence[Tensor]]

_MOST = 2**20
_LISTS = "give a list of lists of tensors, one list per rank, or a function (rank, step) -> list together with ranks=p"


def count(name: str, value: object, least: int) -> int:
    """An argument that counts something.

    Raises:
        HookOptionError: if it is no integer from ``least`` on, or beyond what a process can hold.
    """
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= _MOST:
        raise HookOptionError(f"{name} is {shown(value, 40)}; give an integer from {least} to {_MOST}.")
    return value


def how_many(gradients: Gradients, ranks: int | None) -> int:
    """The number of virtual ranks.

    Raises:
        HookOptionError: if it cannot be told, or contradicts the gradients.
    """
    if callable(gradients):
        if ranks is None:
            raise HookOptionError("simulate() cannot tell how many ranks there are: pass ranks=p beside the function.")
        return count("ranks", ranks, 1)
    if not isinstance(gradients, list | tuple):
        raise HookOptionTypeError(f"gradients is {type(gradients).__name__}; {_LISTS}.")
    if any(isinstance(one, Tensor) for one in gradients):
        raise HookOptionTypeError(f"gradients is a flat list of tensors; {_LISTS}.")
    if not gradients:
        raise HookOptionError(f"gradients is empty; {_LISTS}.")
    if ranks is not None and ranks != len(gradients):
        raise HookOptionError(f"ranks is {shown(ranks, 40)}, and there are {len(gradients)} lists of gradients.")
    return len(gradients)


def tensors(given: Any, rank: int) -> Sequence[Tensor]:
    """One rank's gradients.

    Raises:
        HookOptionError: if they are no list of dense tensors.
    """
    if not isinstance(given, list | tuple) or not all(isinstance(one, Tensor) for one in given):
        raise HookOptionTypeError(f"the gradients of rank {rank} are {shown(given, 60)}; {_LISTS}.")
    if any(one.is_sparse or one.is_meta for one in given):
        raise HookOptionTypeError(f"a gradient of rank {rank} is sparse or on the meta device; give dense tensors.")
    return given


def alike(first: Sequence[Tensor], given: Sequence[Tensor], rank: int) -> None:
    """Raise HookOptionError unless two ranks' gradients have the same shapes and dtypes."""
    mine, theirs = ([(tuple(t.shape), t.dtype) for t in one] for one in (given, first))
    if mine != theirs:
        raise HookOptionError(
            f"the gradients of rank {rank} differ from those of rank 0 in number, shape or dtype; all ranks have the "
            "same parameters."
        )


def as_before(first: Sequence[Tensor], given: Sequence[Tensor], step: int) -> None:
    """Raise HookOptionError unless a step's gradients have the shapes of the first ones; dtypes may change."""
    if [tuple(t.shape) for t in given] != [tuple(t.shape) for t in first]:
        raise HookOptionError(
            f"the gradients of step {step} differ from the first ones in number or shape; a model keeps its parameters."
        )


def hosts_of(hosts: object, ranks: int) -> tuple[int, ...]:
    """The host's number for each rank; by default one host has all.

    Raises:
        HookOptionError: if it is not one integer per rank.
    """
    if hosts is None:
        return (0,) * ranks
    if not isinstance(hosts, list | tuple) or len(hosts) != ranks or not all(isinstance(one, int) for one in hosts):
        raise HookOptionError(f"hosts is {shown(hosts, 60)}; give the number of its host for each of {ranks} ranks.")
    return tuple(hosts)
