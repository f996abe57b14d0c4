"""Between replicas of a sharded model: what FSDP has reduced over the shards is averaged, unit by unit."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from commhub._errors import HookError

from ._cut import cut
from ._fsdp_entry import enter_between

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

    from torch import Tensor

    from commhub.training._trained import Named
    from commhub.training.steps._engine import Engine

    from ._cut import Cut
    from ._fsdp import Shard, Unit

logger = logging.getLogger("commhub")


class Replicas:
    """A unit's buckets are this rank's shards of it."""

    def __init__(self) -> None:
        self._prepared: frozenset[str] = frozenset()
        self._cuts: dict[tuple[Any, ...], list[Cut]] = {}
        self._kept: dict[Unit, tuple[list[str], Tensor]] = {}
        self._held_back: list[Shard] = []

    def parameters(self, units: Sequence[Unit]) -> tuple[Named, ...]:
        """This rank's shards of what is trained now, without those that have no elements."""
        found: list[Any] = [(s.name, s.local) for unit in units for s in unit.shards if s.is_trained and s.numel]
        return tuple(found)

    def attach(self, prepared: Collection[str]) -> None:
        """Take down what the hook was prepared for."""
        self._prepared = frozenset(prepared)
        self._cuts.clear()

    def enter(self, unit: Unit, before: Callable[[], None], reduce: Callable[[Tensor], None]) -> Callable[[], None]:
        """Have FSDP call ``reduce`` with each reduced buffer."""
        return enter_between(unit, before, reduce)

    def exchange(
        self, unit: Unit, parts: Sequence[tuple[Shard, bool]], begin: Callable[[], Engine], *tensors: Tensor
    ) -> None:
        """Average the buffer, or keep it for a later backward."""
        (buffer,) = tensors
        if sum(shard.padded for shard, _ in parts) != buffer.numel():
            raise HookError(
                f"FSDP reduced {buffer.numel()} elements of {unit.name or 'the root'!r}, and which parameters they "
                "belong to cannot be told. Call set_reduce_scatter_unused_params(True) on the model."
            )
        if not self._accumulate(unit, [shard.name for shard, _ in parts], buffer):
            return
        engine = begin()
        for one in self._cut(parts):
            flat = one.take(buffer)
            engine.add(flat, one.parameters, one.spans, one.used, plain=one.plain)
            engine.wait()
            one.put_back(flat, buffer)
        if unit.divide_factor is not None:  # it divides the whole, so that between replicas there is a sum
            buffer.mul_(engine.world_size)

    def give_up(self, *_: Tensor) -> None:
        """What is in the buffer, the mean over the shards, is as good as anything."""

    def end(self) -> None:
        """Take away what FSDP has left for gradients that were held back."""
        while self._held_back:
            self._held_back.pop().parameter.grad = None

    def forget(self) -> None:
        """Drop what a backward that was not finished has left."""
        self._kept.clear()
        self._held_back.clear()

    def leave(self) -> None:
        """Drop everything, and say so if it was to be sent."""
        if self._kept:
            logger.warning("gradients that set_requires_all_reduce(False) has held back are dropped with the hook.")
        self._kept.clear()

    def _accumulate(self, unit: Unit, names: list[str], buffer: Tensor) -> bool:
        """Add what was kept of backwards before; whether the sum is to be sent now. If not, it is kept."""
        former = self._kept.pop(unit, None)
        if former is not None:
            if former[0] != names:
                raise HookError(
                    f"gradients of {', '.join(sorted(set(former[0]) ^ set(names)))} came in some backwards only "
                    "between two exchanges. Call set_reduce_scatter_unused_params(True) on the model."
                )
            buffer.add_(former[1])
        if unit.sends:
            return True
        self._kept[unit] = names, buffer.clone()  # FSDP takes what is in the buffer for a gradient that was averaged
        buffer.zero_()
        self._held_back += [s for s in unit.shards if s.name in names and s.parameter.grad is None]
        return False

    def _cut(self, parts: Sequence[tuple[Shard, bool]]) -> list[Cut]:
        key = tuple((id(shard), used) for shard, used in parts)
        if key not in self._cuts:
            self._cuts[key] = list(cut(parts, self._prepared))
        return self._cuts[key]
