"""The form in which a hook's state is saved: nested dicts of plain tensors, numbers and strings.

Entries that differ per rank stand under a key that carries the rank, because torch's distributed checkpoint merges
equal keys of different ranks silently. What comes back is looked at in full before anything is changed: nobody knows
where it has been.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import attrs
import torch
from torch import Tensor

from commhub._errors import CheckpointError

if TYPE_CHECKING:
    from commhub.protocol._state import State, Tables

FORMAT = 1


def to_dict(hook: str, step: int, rank: int, world_size: int, state: State, part: str = "") -> dict[str, Any]:
    """One rank's state; ``part`` says of which part of the model, if it is not of all of it."""
    return {
        "commhub": FORMAT,
        **({"part": part} if part else {}),
        "hook": hook,
        "step": step,
        "world_size": world_size,
        "shared": state.export("shared"),
        "local": {key_of(rank): state.export("local")},
    }


def key_of(rank: int) -> str:
    """Under which a rank's own entries stand."""
    return f"rank{rank}"


@attrs.frozen(eq=False)
class Saved:
    """One dict, found to be what ``to_dict`` makes: tensors are plain and finite, numbers are in range.

    Attributes:
        hook, step, world_size, shared: as saved.
        local: by former rank.
        part: of the model; empty for all of it.
        where: the file that it was read from.
    """

    hook: str
    step: int
    world_size: int
    shared: Tables
    local: dict[int, Tables]
    part: str = ""
    where: str = ""

    @classmethod
    def of(cls, one: object) -> Saved:
        """Look at one dict.

        Raises:
            CheckpointError: if it is no hook's state, incomplete or damaged.
        """
        if not isinstance(one, Mapping) or one.get("commhub") != FORMAT:
            raise CheckpointError("this is no hook state: give what Registration.state_dict() returned.")
        for key in ("hook", "step", "world_size"):
            if key not in one:
                raise CheckpointError(f"the state is incomplete: {key} is missing.")
        hook, step, world_size = one["hook"], one["step"], one["world_size"]
        if not isinstance(hook, str):
            raise CheckpointError(f"the state is damaged: hook is {type(hook).__name__}, no string.")
        for key, number, least in (("step", step, 0), ("world_size", world_size, 1)):
            if type(number) is not int or number < least:
                raise CheckpointError(f"the state is damaged: {key} is {str(number)[:40]!r}.")
        part = one.get("part", "")
        if not isinstance(part, str):
            raise CheckpointError(f"the state is damaged: part is {type(part).__name__}, no string.")
        shared, local = _tables(one.get("shared"), "shared"), _ranks(one.get("local"), world_size)
        return cls(hook, step, world_size, shared, local, part)


def _ranks(local: object, world_size: int) -> dict[int, Tables]:
    found = {}
    for key, tables in _mapping(local, "local").items():
        number = re.fullmatch(r"rank(0|[1-9]\d{0,8})", str(key))
        if number is None or int(number[1]) >= world_size:
            raise CheckpointError(f"the state is damaged: it is of {world_size} ranks and holds {str(key)[:40]!r}.")
        found[int(number[1])] = _tables(tables, str(key))
    return found


def _mapping(value: object, what: str) -> Mapping[Any, Any]:
    if value is None:  # a distributed checkpoint leaves out what is empty
        return {}
    if not isinstance(value, Mapping):
        raise CheckpointError(f"the state is damaged: {what} is {type(value).__name__}, no dict.")
    return value


def _tables(value: object, what: str) -> Tables:
    """``{parameter: {key: tensor}}``, once it is known to be that."""
    tables: Tables = {}
    for name, table in _mapping(value, what).items():
        tables[str(name)] = {}
        for key, tensor in _mapping(table, f"{what} of parameter {name!r}").items():
            where = f"{key!r} of parameter {name!r}"
            # A tensor that spreads a few bytes over many elements, or has none, is made by hand.
            if type(tensor) not in (Tensor, torch.nn.Parameter) or tensor.layout is not torch.strided:
                raise CheckpointError(f"{where} is {type(tensor).__name__} in the saved state, no plain tensor.")
            held = 0 if tensor.is_meta else tensor.untyped_storage().nbytes()
            if held < tensor.numel() * tensor.element_size():
                raise CheckpointError(f"{where} has fewer bytes in the saved state than its shape needs.")
            if not _is_finite(tensor.detach()):
                raise CheckpointError(
                    f"{where} holds NaN or infinity in the saved state. What a hook remembers is always finite, so it "
                    "was damaged. Load another checkpoint."
                )
            tables[str(name)][str(key)] = tensor.detach()
    return tables


def _is_finite(tensor: Tensor) -> bool:
    """The same as ``isfinite().all()``, without a tensor as large as this one."""
    if tensor.numel() == 0 or not (tensor.is_floating_point() or tensor.is_complex()):
        return True
    real = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
    if real.element_size() < 2:  # torch does not compare such small ones
        real = real.float()
    return all(bool(end.isfinite()) for end in torch.aminmax(real))


def check_finite(state: Mapping[str, Any]) -> None:
    """Raise CheckpointError if a state that is to be saved could not be loaded again."""
    Saved.of(state)
