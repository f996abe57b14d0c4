"""How one bucket is sent: where its matrices lie, and the two messages they share with everything else."""

from __future__ import annotations

from itertools import accumulate, groupby
from typing import TYPE_CHECKING

import attrs
import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from commhub import Bucket

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


@attrs.frozen(eq=False)
class Plan:
    """One bucket's matrices and messages. The messages are kept between steps.

    Attributes:
        batches: what is compressed.
        dense: the other elements, as runs (offset, length) of the bucket.
        first: every P, then everything that is not compressed.
        second: every Q; in an alternation, where only one of the messages is sent, the rest follows here too.
    """

    batches: tuple[Batch, ...]
    dense: tuple[tuple[int, int], ...]
    first: Tensor
    second: Tensor

    def sent(self, iterations: int) -> int:
        """Elements in all messages of so many power iterations."""
        dense = self._dense_elements
        return iterations * (self.first.numel() - dense + self.second.numel()) + dense

    def pack_dense(self, flat: Tensor, message: Tensor) -> None:
        """Copy what is not compressed into a message."""
        for run, place in self._dense_runs(flat, message):
            place.copy_(run)

    def unpack_dense(self, flat: Tensor, message: Tensor) -> None:
        """Copy it back."""
        for run, place in self._dense_runs(flat, message):
            run.copy_(place)

    @property
    def _dense_elements(self) -> int:
        return sum(length for _, length in self.dense)

    def _dense_runs(self, flat: Tensor, message: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        start = message.numel() - self._dense_elements
        for offset, length in self.dense:
            yield flat.narrow(0, offset, length), message.narrow(0, start, length)
            start += length


def lay_out(bucket: Bucket, matrices: Mapping[str, Matrix], *, batched: bool, alternating: bool) -> Plan:
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
    return Plan(batches, dense, first, second)


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
