"""Averagers of parameters: every few steps among all ranks, or by a hierarchy of groups."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import attrs
import torch

from commhub import AllReduce, HookOptionError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from commhub import Bucket, Exchange, Setup, Subgroup


def _is_period(_owner: object, _field: attrs.Attribute[int], value: object) -> None:
    if not _is_count(value):
        raise ValueError(f"period is {value!r}; give a number of steps of at least 1, such as period=8.")


def _is_warmup(_owner: object, _field: attrs.Attribute[int], value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"warmup_steps is {value!r}; give a number of steps, 0 or more.")


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _mean(bucket: Bucket) -> Exchange:
    # A wire dtype of the registration is for gradients: parameters that are rounded lose what small steps add up to.
    bucket.flat.copy_((yield AllReduce(bucket.flat, wire=torch.float64)))


@attrs.define
class Periodic:
    """Average among all ranks every ``period`` steps.

    After step s, counted from 0, where s >= ``warmup_steps`` and ``period`` divides s - ``warmup_steps``: with a
    period of 4 and 13 steps of warm-up after 13, 17, 21, ... So do PyTorch's, and Lin et al. 2018 (arXiv 1808.07217).

    Args:
        period: steps from one average to the next, at least 1.
        warmup_steps: steps before the first average.
        buffers: average floating-point buffers too, such as running statistics.
        optimizer_state: average the optimizer's tensors that have a parameter's shape too, such as momentum.
    """

    period: int = attrs.field(default=8, validator=_is_period)
    warmup_steps: int = attrs.field(default=0, validator=_is_warmup)
    buffers: bool = False
    optimizer_state: bool = False
    _group: Subgroup | None = attrs.field(default=None, init=False, repr=False, eq=False)

    def prepare(self, setup: Setup) -> None:
        """Make the communicator."""
        self._group = setup.partition([range(setup.world_size)])

    def due(self, step: int) -> Subgroup | None:
        """All ranks, every ``period`` steps."""
        since = step - self.warmup_steps
        return self._group if since >= 0 and since % self.period == 0 else None

    def reduce(self, bucket: Bucket) -> Exchange:
        """The mean, in the parameters' own dtype."""
        return _mean(bucket)


@attrs.define
class Hierarchical:
    """Average among few ranks often and among all seldom (hierarchical SGD, Castiglia et al. 2020, arXiv 2010.12998).

    ``{2: 2, 8: 4}`` averages pairs of ranks every 2 steps and all four ranks every 8. After step s the longest period
    that divides s - ``warmup_steps`` decides, so that one level of all ranks is ``Periodic``. Groups are consecutive
    ranks: [0, 1], [2, 3].

    Args:
        periods: {period: size of the groups}. Each period is a multiple of the one before it, each size too, and
            the last size is the number of ranks.
        warmup_steps, buffers, optimizer_state: as for ``Periodic``.

    PyTorch's averager of this name does not count from the warm-up's end: with a period of 4 and 10 steps of warm-up it
    averages after 12, 16, 20, and this one after 10, 14, 18. ``commhub-compat`` has one that does as PyTorch's.
    """

    periods: Mapping[int, int] | None = None
    warmup_steps: int = attrs.field(default=0, validator=_is_warmup)
    buffers: bool = False
    optimizer_state: bool = False
    _groups: dict[int, Subgroup | None] = attrs.field(factory=dict, init=False, repr=False, eq=False)

    def __attrs_post_init__(self) -> None:
        for problem in _problems(self.periods):
            raise ValueError(f"periods is {self.periods!r}: {problem}")

    @property
    def groups(self) -> dict[int, Subgroup | None]:
        """By period, the group that this rank averages in; empty until it is registered."""
        return dict(self._groups)

    def prepare(self, setup: Setup) -> None:
        """Make the communicators of every level."""
        levels = sorted((self.periods or {}).items())
        _, largest = levels[-1]
        if largest != setup.world_size:
            raise HookOptionError(
                f"hierarchical: the largest group in periods={dict(levels)!r} is of {largest} ranks, and there are "
                f"{setup.world_size}. Make it {setup.world_size}, so that all of them meet."
            )
        for period, size in levels:
            starts = range(0, setup.world_size, size)
            self._groups[period] = setup.partition([range(start, start + size) for start in starts])

    def due(self, step: int) -> Subgroup | None:
        """The group of the longest period that divides the steps since the warm-up."""
        since = step - self.warmup_steps
        due = [period for period in self._groups if since >= 0 and since % period == 0]
        return self._groups[max(due)] if due else None

    def reduce(self, bucket: Bucket) -> Exchange:
        """The mean, in the parameters' own dtype."""
        return _mean(bucket)


def _problems(periods: object) -> Iterator[str]:
    """What is wrong with a hierarchy, whatever the number of ranks."""
    if not isinstance(periods, dict) or not periods:
        yield "give the size of the groups for each period, such as {2: 2, 8: 4}."
        return
    for period, size in periods.items():
        if not _is_count(period) or not _is_count(size):
            yield f"{period!r}: {size!r} is no period and size of a group, which are whole numbers of at least 1."
            return
    for (short, small), (long, large) in itertools.pairwise(sorted(periods.items())):
        if long % short:
            yield f"the period {long} is no multiple of {short}. Make each a multiple of the one before it."
        elif large <= small or large % small:
            yield f"groups of {large} are not made of groups of {small}. The longer the period, the larger the groups."
