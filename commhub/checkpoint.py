"""Hook state inside ``torch.distributed.checkpoint``."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, Any, NoReturn, TypeGuard

import torch

from commhub._errors import CheckpointError
from commhub._printable import shown
from commhub.training._registration import Registration
from commhub.training._target import is_part
from commhub.training.saving._saving import of_other_part

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping


class HookState:
    """A registration as a Stateful: put it into the dict that ``dcp.save`` and ``dcp.load`` are given.

    Args:
        registration: whose state.
        checkpoint_id: for loading where another number of ranks may have saved: the path that ``dcp.load`` is given,
            from which that number is read. Every rank then reads all residuals and keeps their mean.
        saved_ranks: for loading from a storage that is no directory: with how many ranks the checkpoint was saved, if
            that is not the number of ranks here.

    What is made to load what another number of ranks saved cannot be saved itself; ``HookState(registration)`` can.

    Raises:
        CheckpointError: if these are no registration, no path and no number of ranks.

    >>> dcp.save({"model": model.state_dict(), "hook": HookState(registration)}, checkpoint_id=path)  # doctest: +SKIP
    >>> dcp.load({"model": weights, "hook": HookState(registration, path)}, checkpoint_id=path)  # doctest: +SKIP
    """

    def __init__(
        self,
        registration: Registration,
        checkpoint_id: str | os.PathLike[str] | None = None,
        *,
        saved_ranks: int | None = None,
    ) -> None:
        if not isinstance(registration, Registration):
            raise CheckpointError(f"HookState takes what commhub.register returned, not {shown(registration)}.")
        if checkpoint_id is not None and not isinstance(checkpoint_id, str | os.PathLike):
            raise CheckpointError(
                f"checkpoint_id is {shown(checkpoint_id, 40)}; give the path of a directory, or None."
            )
        if saved_ranks is not None and not _is_count(saved_ranks):
            raise CheckpointError(f"saved_ranks is {shown(saved_ranks, 40)}; give a number of ranks, or None.")
        if checkpoint_id is not None and saved_ranks is not None:
            raise CheckpointError(
                "both checkpoint_id and saved_ranks are given; the checkpoint says how many ranks saved."
            )
        self._registration = registration
        self._checkpoint_id = checkpoint_id
        self._saved_ranks = saved_ranks
        self._nothing: dict[str, dict[str, torch.Tensor]] | None = None

    def state_dict(self) -> dict[str, Any]:
        """What is saved, and what a load fills in.

        Raises:
            CheckpointError: if the checkpoint cannot be read, or holds several that this registration's could be.
        """
        state, part = self._own(), self._part
        return {part: state} if part else state

    @property
    def _part(self) -> str:
        """Under which this rank's dict stands beside those of other parts of the model, whose keys are the same."""
        return self._registration._session.target.part

    def _own(self) -> dict[str, Any]:
        state = self._registration.state_dict()
        ((own, mine),) = state["local"].items()
        self._nothing = None if mine else {own: {}}
        saved_ranks = self._saved_ranks
        if self._checkpoint_id is not None:
            saved_ranks = _ranks_that_saved(self._checkpoint_id, self._part, _paths(mine))
        if saved_ranks is not None and saved_ranks != state["world_size"]:
            state["world_size"] = _ToBeLoaded(saved_ranks)
            state["local"] = {f"rank{rank}": _zeros(mine) for rank in range(saved_ranks)}
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what was loaded. Each rank calls it for itself; where it fails on one, all ranks must stop.

        Raises:
            CheckpointError: as ``Registration.load_state_dict``; nothing is changed then on this rank.
        """
        if self._part and isinstance(state, dict):
            state = state.get(self._part, {})
        saved_ranks = state.get("world_size") if isinstance(state, dict) else None
        if _is_count(saved_ranks) and self._nothing is not None and state.get("local") == self._nothing:
            state = {**state, "local": {f"rank{rank}": {} for rank in range(saved_ranks)}}  # a load adds no keys
        self._registration.load_state_dict(state)


def _is_count(ranks: object) -> TypeGuard[int]:
    return isinstance(ranks, int) and not isinstance(ranks, bool) and 1 <= ranks <= 2**20


class _ToBeLoaded(int):
    """A number of ranks among zeros that a load fills in: saved as they are they would be lost residuals."""

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise CheckpointError(
            "this HookState was made to load what another number of ranks saved. Save with HookState(registration)."
        )


def _zeros(tables: Mapping[str, Mapping[str, torch.Tensor]]) -> dict[str, dict[str, torch.Tensor]]:
    return {name: {key: torch.zeros_like(value) for key, value in table.items()} for name, table in tables.items()}


def _paths(tables: Mapping[str, Mapping[str, torch.Tensor]]) -> list[str]:
    return [f"{name}.{key}" for name, table in tables.items() for key in table]


def _ranks_that_saved(checkpoint_id: str | os.PathLike[str], part: str, paths: Iterable[str]) -> int | None:
    """How many ranks saved tensors of this part of a model under these paths; None if none differs between ranks."""
    from torch.distributed.checkpoint.filesystem import FileSystemReader  # only who uses it pays for it

    try:
        names = FileSystemReader(checkpoint_id).read_metadata().state_dict_metadata
    except Exception as error:
        text = f"{os.fspath(checkpoint_id)}: no checkpoint of torch.distributed.checkpoint can be read there ({error})."
        raise CheckpointError(text) from error
    if (parts := _parts_in(names)) and part not in parts:
        raise CheckpointError(f"{os.fspath(checkpoint_id)}: {of_other_part(sorted(parts), part)}")
    ranks: dict[str, set[int]] | None = None
    for path in paths:
        mine: dict[str, set[int]] = {}
        for under, rank in _found(names, path):
            mine.setdefault(under, set()).add(rank)
        ranks = mine if ranks is None else {under: ranks[under] & mine[under] for under in ranks.keys() & mine.keys()}
    ranks = ranks or {}
    counts = {len(found) for found in ranks.values()}
    if len(counts) > 1:
        under = ", ".join(sorted(name.rstrip(".") for name in ranks))
        raise CheckpointError(
            f"{os.fspath(checkpoint_id)}: different numbers of ranks saved {under}; give saved_ranks=."
        )
    return counts.pop() if counts else None


def _parts_in(names: Iterable[str]) -> set[str]:
    """Of which parts of models hook state was saved; an empty name stands for all of one."""
    paths = (name.split(".") for name in names)
    above = (path[-2] if len(path) > 1 else "" for path in paths if path[-1] == "world_size")
    return {one if is_part(one) else "" for one in above}


def _found(names: Iterable[str], path: str) -> Iterator[tuple[str, int]]:
    """Under what, and for which ranks, the path was saved."""
    pattern = re.compile(rf"(.*\.)?local\.rank(\d+)\.{re.escape(path)}", re.DOTALL)
    for name in names:
        if match := pattern.fullmatch(name):
            yield match[1] or "", int(match[2])
