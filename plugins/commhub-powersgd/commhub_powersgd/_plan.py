"""How one bucket is sent: where its matrices lie, and the two messages they share with everything else."""

from __future__ import annotations

import weakref
from itertools import accumulate, groupby
from typing import TYPE_CHECKING

import attrs
import torch
from torch import Tensor

from ._iteration import Approximation

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from commhub import Bucket

    from ._compiled import Compiled
    from ._layout import Matrix


@attrs.frozen(eq=False)
class Batch:
    """Matrices of one shape that lie evenly spaced in the bucket; one alone is a batch too.

    Attributes:
        places: of the parameters in the bucket.
        matrices: what they are.
        offset, spacing: in elements, of the first matrix and from one to the next.
        p, q: views of the messages, (batch, rank, rows) and (batch, rank, cols).
    """

    places: tuple[int, ...]
    matrices: tuple[Matrix, ...]
    offset: int
    spacing: int
    p: Tensor
    q: Tensor

    def inside(self, flat: Tensor) -> Tensor:
        """The matrices as they lie in the bucket: (batch, rows, cols)."""
        _, _, rows = self.p.shape
        cols = self.q.shape[2]
        return flat.as_strided(
            (len(self.places), rows, cols), (self.spacing, cols, 1), flat.storage_offset() + self.offset
        )


@attrs.define(eq=False)
class Plan:
    """One bucket's matrices and messages. The messages are kept between steps.

    Attributes:
        batches: what is compressed.
        dense: the other elements, as runs (offset, length) of the bucket.
        first: every P, then everything that is not compressed.
        second: every Q; in an alternation, where only one of the messages is sent, the rest follows here too.
        in_first, in_second: where in the messages the other elements are, run by run.
        compiled: the passes over matrices, if there are any.
    """

    batches: tuple[Batch, ...]
    dense: tuple[tuple[int, int], ...]
    first: Tensor
    second: Tensor
    in_first: Sequence[Tensor]
    in_second: Sequence[Tensor]
    compiled: Compiled | None
    _seat: Seat | None = attrs.field(init=False, default=None, repr=False)
    _seen: weakref.ref[torch.UntypedStorage] | None = attrs.field(init=False, default=None, repr=False)

    def sent(self, iterations: int) -> int:
        """Elements in all messages of so many power iterations."""
        dense = sum(length for _, length in self.dense)
        return iterations * (self.first.numel() - dense + self.second.numel()) + dense

    def seat(self, flat: Tensor) -> Seat:
        """The plan where the bucket's memory is: the same object while that stays.

        It holds the memory, and so is kept only where that has outlived a step anyhow, as DDP's own buckets do.
        """
        if self._seat is not None and self._seat.flat.data_ptr() == flat.data_ptr():
            return self._seat
        runs = [flat.narrow(0, offset, length) for offset, length in self.dense]
        seat = Seat(flat, runs, self.in_first, self.in_second, self.compiled)
        storage = flat.untyped_storage()
        self._seat = seat if self._seen is not None and self._seen() is storage else None
        self._seen = weakref.ref(storage)
        return seat


@attrs.define(eq=False)
class Seat:
    """A plan at one place in memory, with the views that it takes; making them anew in each step would cost more.

    Attributes:
        flat: the bucket.
        dense: what is not compressed, in the bucket.
        in_first, in_second: where it goes in the messages.
        compiled: as the plan's.
        approximations: by batch, those that can serve in every step.
    """

    flat: Tensor
    dense: Sequence[Tensor]
    in_first: Sequence[Tensor]
    in_second: Sequence[Tensor]
    compiled: Compiled | None
    approximations: dict[int, Approximation] = attrs.field(init=False, factory=dict)

    def pack_dense(self, *, left: bool) -> None:
        """Copy what is not compressed into the first or second message."""
        for run, place in zip(self.dense, self.in_first if left else self.in_second, strict=True):
            place.copy_(run)

    def unpack_dense(self, *, left: bool) -> None:
        """Copy it back."""
        for run, place in zip(self.dense, self.in_first if left else self.in_second, strict=True):
            run.copy_(place)

    def approximation(self, batch: Batch, start: Tensor) -> Approximation:
        """A batch's matrices, to begin with ``start``: in the bucket's own memory if that is wide enough."""
        kept = self.approximations.get(batch.offset)
        if kept is not None:
            kept.start = start
            return kept
        m = batch.inside(self.flat)
        wide = m.to(batch.p.dtype)
        made = Approximation(matrices=batch.matrices, m=wide, start=start, p=batch.p, q=batch.q, compiled=self.compiled)
        if wide is m:
            self.approximations[batch.offset] = made
        return made


def lay_out(
    bucket: Bucket,
    matrices: Mapping[str, Matrix],
    *,
    batched: bool,
    alternating: bool,
    compiled: Compiled | None = None,
) -> Plan:
    """Lay a bucket's messages out; without batches they are empty. For a bucket in 16 bits they are in float32.

    The few elements that are not compressed then travel in 32 bits too: that keeps it to one message, and sums
    them better.
    """
    dtype = torch.promote_types(bucket.flat.dtype, torch.float32)
    names, sizes = bucket.names, [segment.numel() for segment in bucket.segments]
    offsets = [0, *accumulate(sizes)][:-1]
    compressed = [i for i, name in enumerate(names) if name in matrices]
    batched = batched and dtype == bucket.flat.dtype  # otherwise there are only copies, each on its own
    groups = list(_evenly(compressed, names, offsets, matrices)) if batched else [[i] for i in compressed]
    dense = _runs([(offsets[i], sizes[i]) for i in range(len(names)) if compressed and names[i] not in matrices])

    shapes = [matrices[names[group[0]]] for group in groups]
    left = [len(group) * m.rank * m.rows for group, m in zip(groups, shapes, strict=True)]
    right = [len(group) * m.rank * m.cols for group, m in zip(groups, shapes, strict=True)]
    others = sum(length for _, length in dense)
    first = bucket.flat.new_empty(sum(left) + others, dtype=dtype)
    second = bucket.flat.new_empty(sum(right) + (others if alternating else 0), dtype=dtype)
    lengths = [length for _, length in dense]
    batches = tuple(
        Batch(
            places=tuple(group),
            matrices=tuple(matrices[names[i]] for i in group),
            offset=offsets[group[0]],
            spacing=offsets[group[1]] - offsets[group[0]] if len(group) > 1 else sizes[group[0]],
            p=p.view(len(group), m.rank, m.rows),
            q=q.view(len(group), m.rank, m.cols),
        )
        for group, m, p, q in zip(
            groups, shapes, first[: sum(left)].split(left), second[: sum(right)].split(right), strict=True
        )
    )
    in_first = first[sum(left) :].split(lengths) if dense else ()
    in_second = second[sum(right) :].split(lengths) if dense and alternating else ()
    return Plan(batches, dense, first, second, in_first, in_second, compiled)


def _evenly(
    places: Sequence[int], names: Sequence[str], offsets: Sequence[int], matrices: Mapping[str, Matrix]
) -> Iterator[list[int]]:
    """Places of one matrix shape and rank, in groups whose offsets are evenly spaced: a strided view, no copy."""

    def shape(i: int) -> tuple[int, int, int]:
        return matrices[names[i]].rows, matrices[names[i]].cols, matrices[names[i]].rank

    for _, same in groupby(sorted(places, key=shape), key=shape):
        group: list[int] = []
        for i in same:
            if len(group) > 1 and offsets[i] - offsets[group[-1]] != offsets[group[1]] - offsets[group[0]]:
                yield group
                group = []
            group.append(i)
        yield group


def _runs(spans: Sequence[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """The same elements with neighbours joined."""
    runs: list[tuple[int, int]] = []
    for offset, length in spans:
        if runs and sum(runs[-1]) == offset:
            runs[-1] = (runs[-1][0], runs[-1][1] + length)
        else:
            runs.append((offset, length))
    return tuple(runs)
