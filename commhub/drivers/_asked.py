"""What a task asks for, as ranks compare it."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import attrs

if TYPE_CHECKING:
    from commhub.protocol._collectives import Subgroup
    from commhub.protocol._spans import Span

Serial = tuple[int, ...]

_SHOWN = 4
"""How many parameters an error names."""


@attrs.frozen
class Position:
    """Where a task stands in what all members of its group do alike.

    Attributes:
        topic: what it is a part of: the step's buckets, an average of parameters.
        serial: which of those: growing, and counted alike on all members.
        index: which of its buckets.
        compared: whether what it asks for is compared at all; what is the same by construction need not be.
        era: where it has changed, what was asked for before says nothing.
    """

    topic: str
    serial: Serial
    index: int = 0
    compared: bool = True
    era: Serial = ()


@attrs.define(eq=False)
class Asked:
    """What one task has asked for so far: of each stage the collectives, and the group that they are in."""

    position: Position
    spans: tuple[Span, ...]
    stages: list[tuple[tuple[Any, ...], ...]] = attrs.Factory(list)
    groups: list[Subgroup | None] = attrs.Factory(list)
    finished: bool = False

    def told(self, stage: int, size: int) -> str:
        """What it asked for in a stage, the same words on every rank that asked for the same."""
        if stage >= len(self.stages):
            return "nothing more"
        parts = []
        for kind, dtype, numel, group, manner in self.stages[stage]:
            among = f"all {size} ranks" if group is None else f"ranks {', '.join(map(str, group.ranks))}"
            parts.append(f"{kind.__name__} of {numel} {dtype} among {among}" + (f" {manner}" if manner else ""))
        return " and ".join(parts).replace("torch.", "")

    def whose(self) -> str:
        """The first of the parameters, in words; empty where it has none."""
        names = [span.name for span in self.spans]
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        return f"the gradients of {', '.join(names[:_SHOWN])}{more}" if names else ""

    def names(self) -> str:
        """The parameters, as a short digest."""
        return hashlib.sha256(repr([(s.name, s.shape) for s in self.spans]).encode()).hexdigest()[:16]
