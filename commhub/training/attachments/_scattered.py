"""Inside the group that a model is sharded over: in place of FSDP's reduce-scatter, unit by unit."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Any

import attrs
import torch

from commhub._errors import HookError
from commhub.protocol._bucket import Span

from ._fsdp_entry import enter_inside

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Sequence

    from torch import Tensor

    from commhub.training._trained import Named
    from commhub.training.steps._engine import Engine

    from ._fsdp import Shard, Unit


class Scattered:
    """A unit's bucket is FSDP's buffer: rank by rank, a piece of every parameter as large as its largest shard."""

    def __init__(self) -> None:
        self._prepared: frozenset[str] = frozenset()
        self._choices: dict[tuple[Any, ...], list[_Choice]] = {}

    def parameters(self, units: Sequence[Unit]) -> tuple[Named, ...]:
        """This rank's shards of what is trained now; one without elements has some on other ranks."""
        found: list[Any] = [(s.name, s.local) for unit in units for s in unit.shards if s.is_trained]
        return tuple(found)

    def attach(self, prepared: Collection[str]) -> None:
        """Take down what the hook was prepared for."""
        self._prepared = frozenset(prepared)
        self._choices.clear()

    def enter(
        self, unit: Unit, before: Callable[[], None], reduce: Callable[[Tensor, Tensor, float], None]
    ) -> Callable[[], None]:
        """Have FSDP call ``reduce`` for a reduce-scatter."""
        return enter_inside(unit, before, reduce)

    def exchange(
        self, unit: Unit, parts: Sequence[tuple[Shard, bool]], begin: Callable[[], Engine], *tensors: Any
    ) -> None:
        """Leave the mean of this rank's part in the output, times what FSDP wants it multiplied by."""
        given, output, factor = tensors
        if sum(shard.padded for shard, _ in parts) != output.numel():
            raise HookError(
                f"FSDP reduces {output.numel()} elements of {unit.name or 'the root'!r} for this rank, and which "
                "parameters they belong to cannot be told. Call set_reduce_scatter_unused_params(True) on the model."
            )
        engine = begin()
        for one in self._choose(parts):
            flat, shard = one.take(given.view(engine.world_size, -1), output)
            engine.add(flat, one.parameters, one.spans, one.used, shard=shard, plain=one.plain)
            engine.wait()
            one.put_back(shard, output)
        if engine.has_failed:
            output.zero_()
        elif factor != 1.0:
            output.mul_(factor)

    def give_up(self, *tensors: Any) -> None:
        """Nothing was reduced, and what is in the output is whatever was in that memory before."""
        tensors[1].zero_()

    def end(self) -> None:
        """Nothing is held back."""

    forget = leave = end

    def _choose(self, parts: Sequence[tuple[Shard, bool]]) -> list[_Choice]:
        key = tuple((id(shard), used) for shard, used in parts)
        if key not in self._choices:
            self._choices[key] = list(_choices(parts, self._prepared))
        return self._choices[key]


@attrs.frozen
class _Choice:
    """Some parameters of a unit as one bucket.

    Attributes:
        plain: whether the hook was not prepared for them.
        spans: where each lies in a part of ``take``'s result.
        used: for each, whether backward has reached it.
    """

    plain: bool
    spans: tuple[Span, ...]
    used: tuple[bool, ...]
    _shards: tuple[Shard, ...]
    _columns: tuple[slice, ...]
    _all: bool

    @property
    def parameters(self) -> list[Tensor]:
        """This rank's shards."""
        return [shard.local for shard in self._shards]

    def take(self, parts: Tensor, output: Tensor) -> tuple[Tensor, Tensor]:
        """The gradients (1-D) of parts (p, elements), and memory for what comes of them: the output, if it is all."""
        if self._all:
            return parts.view(-1), output
        chosen = torch.cat([parts[:, columns] for columns in self._columns], dim=1)
        return chosen.view(-1), output.new_empty(chosen.shape[1])

    def put_back(self, shard: Tensor, output: Tensor) -> None:
        """Leave what has become of them where it is looked for."""
        if not self._all:
            sizes = [columns.stop - columns.start for columns in self._columns]
            for columns, result in zip(self._columns, shard.split(sizes), strict=True):
                output[columns] = result


def _choices(parts: Sequence[tuple[Shard, bool]], prepared: Collection[str]) -> Iterator[_Choice]:
    """The buckets of a buffer."""
    end, placed = 0, []
    for shard, used in parts:
        placed.append((shard, used, slice(end, end := end + shard.padded)))
    for plain in (False, True):
        chosen = [one for one in placed if (one[0].name not in prepared) == plain]
        width = sum(shard.padded for shard, _, _ in chosen)
        if not width:
            continue
        spans, offset = [], 0
        for shard, _, _ in chosen:
            spans.append(_span(shard, offset, width))
            offset += shard.padded
        yield _Choice(
            plain,
            tuple(spans),
            tuple(used for _, used, _ in chosen),
            tuple(shard for shard, _, _ in chosen),
            tuple(columns for _, _, columns in chosen),
            len(chosen) == len(placed),
        )


def _span(shard: Shard, offset: int, width: int) -> Span:
    size = shard.padded_size
    p = shard.ranks
    stride = tuple(prod(size[i + 1 :]) for i in range(len(size)))
    return Span(shard.name, (p, *size), (width, *stride), offset, p * shard.padded)
