"""Hook state inside ``torch.distributed.checkpoint``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from commhub._errors import CheckpointError
from commhub._printable import shown
from commhub.training._registration import Registration

if TYPE_CHECKING:
    from collections.abc import Mapping


class HookState:
    """A registration as a Stateful: put it into the dict that ``dcp.save`` and ``dcp.load`` are given.

    Args:
        registration: whose state.
        saved_ranks: for loading, with how many ranks the checkpoint was saved, if that is not the number of ranks
            here. Every rank then reads all residuals and keeps their mean.

    Raises:
        CheckpointError: if these are no registration and no number of ranks.

    >>> dcp.save({"model": model.state_dict(), "hook": HookState(registration)}, checkpoint_id=path)  # doctest: +SKIP
    >>> dcp.load({"model": weights, "hook": HookState(registration)}, checkpoint_id=path)  # doctest: +SKIP
    """

    def __init__(self, registration: Registration, saved_ranks: int | None = None) -> None:
        if not isinstance(registration, Registration):
            raise CheckpointError(f"HookState takes what commhub.register returned, not {shown(registration)}.")
        is_count = isinstance(saved_ranks, int) and not isinstance(saved_ranks, bool) and 1 <= saved_ranks <= 2**20
        if saved_ranks is not None and not is_count:
            raise CheckpointError(f"saved_ranks is {shown(saved_ranks, 40)}; give a number of ranks, or None.")
        self._registration = registration
        self._saved_ranks = saved_ranks

    def state_dict(self) -> dict[str, Any]:
        """What is saved, and what a load fills in."""
        state = self._registration.state_dict()
        if self._saved_ranks is not None:
            (mine,) = state["local"].values()
            state["world_size"] = self._saved_ranks
            state["local"] = {f"rank{rank}": _zeros(mine) for rank in range(self._saved_ranks)}
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what was loaded. Each rank calls it for itself; where it fails on one, all ranks must stop.

        Raises:
            CheckpointError: as ``Registration.load_state_dict``; nothing is changed then on this rank.
        """
        self._registration.load_state_dict(state)


def _zeros(tables: Mapping[str, Mapping[str, torch.Tensor]]) -> dict[str, dict[str, torch.Tensor]]:
    return {name: {key: torch.zeros_like(value) for key, value in table.items()} for name, table in tables.items()}
