"""The form in which a hook's state is saved: nested dicts of plain tensors, numbers and strings.

Entries that differ per rank stand under a key that carries the rank, because torch's distributed checkpoint merges
equal keys of different ranks silently.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from ._hookstring import parse
from ._state import State, check_same

if TYPE_CHECKING:
    from pathlib import Path

FORMAT = 1


def to_dict(hook: str, step: int, rank: int, world_size: int, state: State) -> dict[str, Any]:
    """One rank's state."""
    return {
        "commhub": FORMAT,
        "hook": hook,
        "step": step,
        "world_size": world_size,
        "shared": state.export("shared"),
        "local": {_key(rank): state.export("local")},
    }


def _key(rank: int) -> str:
    return f"rank{rank}"


def merge(state: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One dict that holds what one or several ranks' dicts hold.

    Raises:
        ValueError: if one is not a hook's state, or they are not of one moment.
    """
    dicts = [state] if isinstance(state, Mapping) else list(state)
    if not dicts:
        raise ValueError("no state was given.")
    for one in dicts:
        if not isinstance(one, Mapping) or one.get("commhub") != FORMAT:
            raise ValueError("this is no hook state: give what Registration.state_dict() returned.")
        lacking = [key for key in ("hook", "step", "world_size") if key not in one]
        if lacking:
            raise ValueError(f"the state is incomplete: {lacking[0]} is missing.")
    first = dicts[0]
    for one in dicts[1:]:
        for key in ("hook", "step", "world_size"):
            if one[key] != first[key]:
                raise ValueError(f"the ranks' states do not belong together: {key} is {first[key]!r} and {one[key]!r}.")
    merged = dict(first)
    merged["shared"] = first.get("shared") or {}
    merged["local"] = {rank: tables for one in dicts for rank, tables in (one.get("local") or {}).items()}
    return merged


def from_dict(saved: Mapping[str, Any], hook: str, rank: int, world_size: int, state: State) -> None:
    """Put a merged state back. Nothing is changed if anything is wrong.

    Raises:
        ValueError: if it is of another hook or model, or does not hold the ranks that are needed.
    """
    check_hook(saved, hook)
    former, local = int(saved["world_size"]), saved["local"]
    kept = state.export("local")
    if former == world_size and _key(rank) in local:
        mine = local[_key(rank)] or {}
    elif not kept:
        mine = {}
    else:
        mine = _mean(local, former, rank, world_size)
    check_same(kept, mine)
    check_same(state.export("shared"), saved["shared"])
    state.restore("local", mine)
    state.restore("shared", saved["shared"])


def check_hook(saved: Mapping[str, Any], hook: str) -> None:
    """Raise ValueError unless a merged state is of ``hook``, whatever its wire."""
    if _without_wire(saved["hook"]) != _without_wire(hook):
        raise ValueError(f"the state was saved by {saved['hook']}; this registration runs {hook}. Register that one.")


def _mean(local: Mapping[str, Any], former: int, rank: int, world_size: int) -> dict[str, dict[str, torch.Tensor]]:
    missing = [r for r in range(former) if _key(r) not in local]
    if missing:
        held = ", ".join(sorted(local)) or "none"
        need = f"rank {rank}'s" if former == world_size else f"all {former} former ranks'"
        raise ValueError(
            f"the state is of {former} ranks and holds {held}; rank {rank} of {world_size} needs {need}. "
            "Pass the list of all former ranks' dicts."
        )
    tables = [local[_key(r)] or {} for r in range(former)]
    for other in tables[1:]:
        check_same(tables[0], other)
    return {
        name: {key: sum(t[name][key] for t in tables) / former for key in table} for name, table in tables[0].items()
    }


def _without_wire(hook: str) -> tuple[str, str]:
    name, _, options = hook.partition("(")
    given = parse(f"x({options}").options if options else {}
    return name.rpartition(":")[2], repr(sorted((k, v) for k, v in given.items() if k != "wire"))


def write(directory: Path, rank: int, state: Mapping[str, Any]) -> None:
    """Write one rank's file; it appears whole or not at all."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{_key(rank)}.pt"
    partial = path.with_suffix(".partial")
    torch.save(dict(state), partial)
    os.replace(partial, path)


def read(directory: Path) -> list[dict[str, Any]]:
    """All former ranks' states from a directory.

    Raises:
        ValueError: if a rank's file is missing.
    """
    first = directory / f"{_key(0)}.pt"
    if not first.exists():
        raise ValueError(f"{directory} holds no hook state: there is no {first.name}.")
    states = [torch.load(first, map_location="cpu", weights_only=True)]
    for rank in range(1, int(states[0]["world_size"])):
        path = directory / f"{_key(rank)}.pt"
        if not path.exists():
            raise ValueError(
                f"{directory} holds the state of {states[0]['world_size']} ranks, but {path.name} is missing."
            )
        states.append(torch.load(path, map_location="cpu", weights_only=True))
    return states
