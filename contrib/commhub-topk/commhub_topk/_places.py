"""Which elements of a parameter are sent: each rank's own largest, or blocks that all ranks take in turn."""

from __future__ import annotations

import hashlib
from math import ceil, prod
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Iterable

    from commhub import Setup, State

BLOCK = 64
"""Elements that are sent together where all ranks send the same ones."""


class Largest:
    """A share of the elements, those of the largest magnitude. What is not a number counts as the largest of all."""

    def __init__(self, ratio: float) -> None:
        self._ratio = ratio

    def of(self, _name: str, values: Tensor) -> Tensor:
        """Places in ``values`` (1-D, not empty): int64, ``ceil(ratio * numel)`` of them, each once."""
        return values.abs().topk(ceil(values.numel() * self._ratio), sorted=False).indices


class InTurn:
    """The same blocks on all ranks: in a random order that seed and name decide, a share of them in each step.

    How far a parameter has come is shared state, so that a run which resumes goes on there. The elements that fill
    no block go along each time.
    """

    def __init__(self, setup: Setup, names: Iterable[str], ratio: float, seed: int) -> None:
        self._ratio = ratio
        self._state: State = setup.state
        self._orders: dict[str, Tensor] = {}
        sizes = {name: prod(shape) for name, shape in zip(setup.names, setup.shapes, strict=True)}
        for name in names:
            digest = hashlib.blake2b(f"{seed} {name}".encode(), digest_size=7).digest()
            random = torch.Generator().manual_seed(int.from_bytes(digest, "little"))
            self._orders[name] = torch.randperm(sizes[name] // BLOCK, generator=random).to(setup.device)
            setup.state.shared(name)["turn"] = torch.zeros((), dtype=torch.int64, device=setup.device)

    def of(self, name: str, values: Tensor) -> Tensor:
        """Places in ``values`` (1-D): int64, each once, as many in each step; the next step's are others."""
        order, device = self._orders[name], values.device
        blocks, whole = len(order), len(order) * BLOCK
        taken = ceil(blocks * self._ratio)
        turn = self._state.shared(name)["turn"]
        self._state.shared(name)["turn"] = turn + 1
        chosen = order[(turn * taken + torch.arange(taken, device=device)) % max(blocks, 1)]
        inside = chosen.unsqueeze(1) * BLOCK + torch.arange(BLOCK, device=device)
        return torch.cat([inside.view(-1), torch.arange(whole, values.numel(), device=device)])
