"""Which parameters a hook compresses, and from which step on; the others are averaged exactly, beside them."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from commhub._errors import HookOptionError
from commhub.protocol._collectives import AllReduce, ReduceScatter

from ._columns import columns_of, put_columns
from ._rules import Rules

if TYPE_CHECKING:
    from collections.abc import Container, Generator, Mapping

    from commhub.protocol._bucket import Bucket
    from commhub.protocol._collectives import Collective
    from commhub.protocol._hook import Exchange
    from commhub.protocol._setup import Setup

_SMALL = 1024
"""Elements below which a parameter counts as small."""


class Selection:
    """What is compressed: parameters of a floating dtype that no rule calls dense, if they are large enough.

    Args:
        rules: what holds for single parameters. A setting ``"dense_small"`` there counts instead of the argument.
        min_numel: elements that a parameter has at least, 1 or more: an empty one is never compressed.
        max_numel: elements that it has at most.
        dense_small: leave out vectors, scalars and parameters of less than 1024 elements.
        start_step: so many steps compress nothing.

    Attributes:
        start_step: as given.

    Raises:
        HookOptionError: if one of them cannot be that.
    """

    def __init__(
        self,
        rules: Rules,
        min_numel: int = 1,
        start_step: int = 0,
        *,
        max_numel: int | None = None,
        dense_small: bool = False,
    ) -> None:
        if not isinstance(rules, Rules):
            raise HookOptionError(f"rules is {rules!r}; give Rules(rules, settings).")
        for what, value in (("min_numel", min_numel), ("start_step", start_step)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise HookOptionError(f"{what} is {value!r}; it must be at least 0.")
        self._rules, self.start_step, self._dense_small = rules, start_step, dense_small
        self._least, self._most = max(min_numel, 1), max_numel
        self._chosen: dict[str, dict[str, object]] = {}

    def choose(self, setup: Setup) -> Mapping[str, Mapping[str, object]]:
        """The parameters that are compressed, in the model's order, with their settings. Call it in ``prepare``.

        Raises:
            HookOptionError: if a rule matches no parameter.
        """
        settings = self._rules.settings(setup.names)
        first = 1 if setup.scatters else 0  # a vector stays one, in however many pieces
        self._chosen = {
            name: its
            for name, shape, dtype in zip(setup.names, setup.shapes, setup.dtypes, strict=True)
            if (its := settings[name]) is not None
            and dtype.is_floating_point
            and self._fits(len(shape) - first, prod(shape), its)
        }
        return self._chosen

    def places(self, bucket: Bucket) -> list[int]:
        """Places in the bucket of the parameters that are compressed in this step."""
        if bucket.step < self.start_step:
            return []
        return [i for i, name in enumerate(bucket.names) if name in self._chosen]

    def beside(self, bucket: Bucket, collective: Collective) -> Generator[Any, Any, Tensor]:
        """The result of ``collective``: ``result = yield from selection.beside(bucket, collective)``.

        In the same stage an all-reduce averages what is not compressed in this step. Its mean is in the bucket then. In
        a bucket for ``reduce_scatter`` a reduce-scatter does, and its mean is in ``bucket.shard``.
        """
        taken = set(self.places(bucket))
        result: Tensor
        if bucket.shard is not None:
            result = yield from _beside(bucket, bucket.shard, taken, collective)
            return result
        rest = [segment for i, segment in enumerate(bucket.segments) if i not in taken]
        exact = torch.cat(rest) if rest else bucket.flat.new_empty(0)
        if not exact.numel():
            alone: Tensor = yield collective
            return alone
        result, mean = yield (collective, AllReduce(exact))
        for segment, its in zip(rest, mean.split([segment.numel() for segment in rest]), strict=True):
            segment.copy_(its)
        return result

    @staticmethod
    def exactly(bucket: Bucket) -> Exchange:
        """Average a bucket of which nothing is compressed: ``yield from selection.exactly(bucket)``."""
        if bucket.shard is not None:
            bucket.shard = yield ReduceScatter(bucket.flat)
            return
        bucket.flat.copy_((yield AllReduce(bucket.flat)))

    def _fits(self, dimensions: int, numel: int, settings: Mapping[str, object]) -> bool:
        if settings.get("dense_small", self._dense_small) and (dimensions < 2 or numel < _SMALL):
            return False
        return self._least <= numel and (self._most is None or numel <= self._most)


def _beside(
    bucket: Bucket, shard: Tensor, taken: Container[int], collective: Collective
) -> Generator[Any, Any, Tensor]:
    rest = [columns for i, columns in enumerate(columns_of(bucket)) if i not in taken]
    exact = torch.cat([bucket.parts[:, columns] for columns in rest], dim=1) if rest else bucket.flat.new_empty(0)
    if not exact.numel():
        alone: Tensor = yield collective
        return alone
    result: Tensor
    result, mean = yield (collective, ReduceScatter(exact.view(-1)))
    put_columns(shard, rest, mean)
    return result
