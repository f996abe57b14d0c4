"""One bucket of gradients, as a hook sees it.

The core lays the bucket out; a hook reads ``gradients`` (or ``segments``) and leaves the average in ``flat``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs
import torch
from torch import Tensor

from commhub._errors import HookOptionError
from commhub._printable import shown

from ._collectives import Subgroup, foreign
from ._finite import all_finite

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


@attrs.frozen
class Span:
    """Where one parameter's gradient lies in a bucket: ``numel`` elements from ``offset``, with these strides."""

    name: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    numel: int


def lay_out(names: Sequence[str], tensors: Iterable[Tensor]) -> tuple[Span, ...]:
    """The spans of tensors that follow one another in a bucket, in their order.

    A tensor that fills its memory without gaps keeps its strides (channels_last, transposed); any other is
    contiguous in the bucket, as in PyTorch's reducer.
    """
    spans, offset = [], 0
    for name, tensor in zip(names, tensors, strict=True):
        dense = torch.empty_like(tensor, device="meta").stride()  # its own strides, unless there are gaps
        stride = dense if dense == tensor.stride() else torch.empty(tensor.shape, device="meta").stride()
        spans.append(Span(name, tuple(tensor.shape), tuple(stride), offset, tensor.numel()))
        offset += tensor.numel()
    return tuple(spans)


class _Flag:
    """What a bucket and its parts share.

    Attributes:
        value: whether everything that was reduced so far is finite, as far as was looked.
        looked: whether anything was looked at.
        overlooked: whether there was a result that says nothing: of integers, or not equal on all ranks.
        written: residuals that were given out to be written into, by address; see ``ErrorFeedback.writable``.
        unentered: parts with a subgroup of their own that no hook from ``create`` has taken up yet.
        narrow: whether the result may overflow where nothing that was reduced did: it is of 16 bits, and wider ones
            were perhaps reduced.
    """

    __slots__ = ("looked", "narrow", "overlooked", "unentered", "value", "written")

    def __init__(self, flat: Tensor) -> None:
        self.value = torch.ones((), dtype=torch.bool, device=flat.device)
        self.narrow = flat.dtype == torch.float16
        self.looked = self.overlooked = False
        self.written: dict[int, Tensor] = {}
        self.unentered = 0


@attrs.define(eq=False, kw_only=True, repr=False)
class Bucket:
    """The gradients that are averaged in one go.

    Attributes:
        flat: 1-D, all gradients of the bucket one after another; the result is left here.
        parameters: the parameters, in the bucket's order.
        names: their names in the model, the keys of all state.
        used: per parameter, whether this rank's backward reached it in this step.
        index: place of the bucket in the order of arrival within the step, from 0.
        step: synchronised backward passes before this one, from 0.
        divisor: what a mean divides by: the number of ranks, or of those still active under ``join``.
        rank: of this process in the group that averages.
        world_size: of that group.
        loss_scale: what the loss was multiplied by (``scaler=``); residuals are kept divided by it.
        group: the subgroup of a ``part``; ``None`` is all ranks.
        divides: whether a mean divides, as DDP does under ``batched_grad_copy``, or multiplies by 1/divisor, as it
            does elsewhere: for three ranks the last bit differs.
        shard: for ``reduce_scatter``, which leaves the mean of this rank's part here: 1-D, as long as a row of
            ``parts``. ``None`` for ``reduce``.
    """

    flat: Tensor
    parameters: tuple[Tensor, ...]
    used: tuple[bool, ...]
    index: int
    step: int
    divisor: int
    rank: int
    world_size: int
    loss_scale: float = 1.0
    group: Subgroup | None = None
    divides: bool = False
    shard: Tensor | None = None
    _spans: tuple[Span, ...]
    _finite: _Flag = attrs.field(default=attrs.Factory(lambda self: _Flag(self.flat), takes_self=True))
    _names: tuple[str, ...] | None = attrs.field(default=None, init=False)
    _segments: tuple[Tensor, tuple[Tensor, ...]] | None = attrs.field(default=None, init=False)

    def __repr__(self) -> str:
        return (
            f"Bucket(index={self.index}, step={self.step}, {len(self.names)} parameters, {self.flat.numel()} elements)"
        )

    @property
    def names(self) -> tuple[str, ...]:
        """The parameters' names, in the bucket's order."""
        if self._names is None:
            self._names = tuple(span.name for span in self._spans)
        return self._names

    @property
    def spans(self) -> tuple[Span, ...]:
        """Where each parameter's gradient lies in ``flat``."""
        return self._spans

    @property
    def gradients(self) -> tuple[Tensor, ...]:
        """Views of ``flat``, one per parameter, with the parameter's shape and strides.

        For ``reduce_scatter`` (p, rows of a shard with their padding, ...): one piece for each rank.
        """
        flat = self.flat
        start = flat.storage_offset()
        return tuple(flat.as_strided(s.shape, s.stride, start + s.offset) for s in self._spans)

    @property
    def segments(self) -> tuple[Tensor, ...]:
        """Views of ``flat``, one per parameter, 1-D, their elements in memory order.

        Raises:
            HookOptionError: for ``reduce_scatter``, where a parameter's gradient lies apart, piece by piece.
        """
        if self.shard is not None:
            raise HookOptionError(
                "a bucket for reduce_scatter has no segments: each parameter has a piece in every rank's part. Use "
                "bucket.parts, or bucket.gradients."
            )
        if self._segments is None or self._segments[0] is not self.flat:
            self._segments = (self.flat, self.flat.split([s.numel for s in self._spans]))
        return self._segments[1]

    @property
    def parts(self) -> Tensor:
        """A view of ``flat`` for ``reduce_scatter``, (p, elements): what each rank is to get the mean of.

        A row holds a piece of every parameter, one after another: ``spans`` has their offsets in it.
        """
        return self.flat.view(self.world_size, -1)

    @property
    def finite(self) -> Tensor:
        """Whether all that was reduced so far is finite, equal on all ranks; 0-dim bool on the bucket's device.

        The core keeps it for hooks that hold state, from the floating and complex results that all ranks get alike:
        those of AllReduce, AllGather and Broadcast. Where others took part, it looks at ``flat`` when the exchange has
        ended, and only then decides what is remembered. A hook that sends codes instead of numbers spares it that with
        its own finding, the same on all ranks: ``bucket.finite = bucket.finite & mine``. A ``flat`` of float16 is
        looked at all the same: its result may overflow where nothing that was reduced did.

        In ``reduce_scatter`` each rank knows of its own part alone, and it is this one's; the ranks tell each other at
        the end of the step.
        """
        return self._finite.value

    @finite.setter
    def finite(self, value: Tensor) -> None:
        if value is not self._finite.value:
            self._finite.value = value
            self._finite.looked, self._finite.overlooked = True, False  # the hook knows what it was sent

    @property
    def judged(self) -> bool:
        """Whether ``finite`` comes of all that was reduced so far; else it takes the end of the exchange to know.

        For ``reduce_scatter`` it takes the end of the step.
        """
        return self.shard is None and self._finite.looked and not self._finite.overlooked and not self._finite.narrow

    # The next six are the core's.

    def look_at(self, result: Tensor) -> None:
        """Take a collective's result into account, which all its ranks have alike."""
        self._finite.looked = True
        self._and(all_finite(result))

    def overlook(self) -> None:
        """Note that there was a result that says nothing about all ranks."""
        self._finite.overlooked = True

    def look_at_end(self) -> None:
        """Take the exchange's own result into account, where that of its collectives does not say it all."""
        if not self.judged:
            self._and(all_finite(self.flat if self.shard is None else self.shard))
        self.look_at_written()

    @property
    def written(self) -> dict[int, Tensor]:
        """Residuals that were given out to be written into, by address."""
        return self._finite.written

    def look_at_written(self) -> None:
        """Take out of the residuals that were written into what is not finite."""
        for residual in self._finite.written.values():
            if not all_finite(residual):
                torch.nan_to_num(residual, nan=0.0, posinf=0.0, neginf=0.0, out=residual)
        self._finite.written.clear()

    def _and(self, finite: Tensor) -> None:
        if finite.device.type != "cpu":
            self._finite.value = self._finite.value & finite
        elif not finite:  # on the host the answer is there, and rarely changes anything
            self._finite.value = torch.zeros_like(self._finite.value)

    def enter(self) -> None:
        """Say that a hook which keeps to the bucket's subgroup has taken it up; ``create``'s hooks do."""
        if self.group is not None:
            self._finite.unentered -= 1

    @property
    def is_entered(self) -> bool:
        """Whether every part with a subgroup was taken up by a hook that keeps to it."""
        return self._finite.unentered <= 0

    def to(self, dtype: torch.dtype) -> Bucket:
        """The same bucket in another dtype, with memory of its own, for ``yield from inner.reduce(...)``.

        What is reduced in it counts for this one's ``finite``; copy the result back into this one's ``flat``, or its
        ``shard``.
        """
        shard = None if self.shard is None else torch.empty_like(self.shard, dtype=dtype)
        return attrs.evolve(self, flat=self.flat.to(dtype, copy=True), shard=shard)

    def part(self, parameters: Sequence[Tensor], group: Subgroup | None = None) -> Bucket:
        """A bucket over some adjacent parameters of this one, sharing its memory, for ``yield from inner.reduce(...)``.

        Args:
            parameters: some of ``self.parameters``, adjacent, in order.
            group: the subgroup among which the inner hook works; it must come from ``commhub.create``.

        Raises:
            HookOptionError: if the parameters are not adjacent parameters of this bucket, or the subgroup is not one
                of this rank's; and for ``reduce_scatter``, which has all of a bucket.
        """
        if self.shard is not None:
            raise HookOptionError("a bucket for reduce_scatter cannot be parted: its parts are those of the ranks.")
        wanted = [id(p) for p in parameters]
        mine = [id(p) for p in self.parameters]
        first = mine.index(wanted[0]) if wanted and wanted[0] in mine else -1
        if first < 0 or mine[first : first + len(wanted)] != wanted:
            raise HookOptionError("part() takes adjacent parameters of this bucket, in the bucket's order.")
        chosen = slice(first, first + len(wanted))
        spans = self._spans[chosen]
        start = spans[0].offset
        group = self.group if group is None else group
        if group is not None and not isinstance(group, Subgroup):
            raise HookOptionError(f"part() among {shown(group)}. Give what setup.partition returned, or None.")
        ranks = None if group is None or group is self.group else group.ranks
        absolute = self.rank if self.group is None else self.group.ranks[self.rank]
        if group is not None and absolute not in group.ranks:
            raise HookOptionError(f"part() among {foreign(group)}")
        if ranks is not None:
            self._finite.unentered += 1
        return Bucket(
            flat=self.flat.narrow(0, start, sum(s.numel for s in spans)),
            parameters=self.parameters[chosen],
            used=self.used[chosen],
            index=self.index,
            step=self.step,
            divisor=self.divisor if ranks is None else len(ranks),
            rank=self.rank if ranks is None else ranks.index(absolute),
            world_size=self.world_size if ranks is None else len(ranks),
            loss_scale=self.loss_scale,
            group=group,
            divides=self.divides,
            spans=tuple(attrs.evolve(s, offset=s.offset - start) for s in spans),
            finite=self._finite,
        )
