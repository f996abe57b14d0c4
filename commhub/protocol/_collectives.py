"""The collectives a hook may ask for, as values.

A hook yields these instead of calling ``torch.distributed``; a driver carries them out. This module holds no
behaviour and imports no torch at run time, so that the command line can describe hooks without loading it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import attrs

if TYPE_CHECKING:
    import torch

Op = Literal["mean", "sum"]


@attrs.frozen
class Subgroup:
    """Some of a registration's ranks, made by ``setup.partition`` in ``prepare``.

    ``ranks`` are ranks of the registration's group, ascending. ``key`` names the partition it belongs to: two
    partitions with equal members are still two communicators.
    """

    ranks: tuple[int, ...]
    key: int = 0

    def __len__(self) -> int:
        return len(self.ranks)


def _op(instance: object, _attribute: attrs.Attribute[str], value: object) -> None:
    if value not in ("mean", "sum"):
        raise ValueError(f"{type(instance).__name__}: op is {value!r}; it is 'mean' or 'sum'.")


@attrs.frozen(eq=False)
class Collective:
    """What every collective carries.

    Attributes:
        tensor: the payload, contiguous, of any shape; the driver's until the hook is resumed, and undefined after.
        wire: a narrower floating dtype to send the payload in; ``None`` leaves that to the registration's ``wire``.
        group: a subgroup from ``setup.partition``; ``None`` means all ranks of the bucket.
    """

    tensor: torch.Tensor
    wire: torch.dtype | None = attrs.field(default=None, kw_only=True)
    group: Subgroup | None = attrs.field(default=None, kw_only=True)


@attrs.frozen(eq=False)
class AllReduce(Collective):
    """Sum or average over the group; the result has the payload's shape and dtype.

    ``op="mean"`` multiplies by 1/divisor before any cast, so that a mean that fits the wire dtype never overflows.
    """

    op: Op = attrs.field(default="mean", kw_only=True, validator=_op)


@attrs.frozen(eq=False)
class ReduceScatter(Collective):
    """Sum or average over the group; rank i of the group gets the i-th of p equal shares, 1-D.

    The payload's number of elements must be a multiple of p.
    """

    op: Op = attrs.field(default="mean", kw_only=True, validator=_op)


@attrs.frozen(eq=False)
class AllGather(Collective):
    """Every rank gets all payloads, concatenated in group-rank order: 1-D, p times the payload's elements."""


@attrs.frozen(eq=False)
class AllToAll(Collective):
    """Share j of the payload (of p equal ones) goes to rank j; the result, 1-D, holds the shares in group-rank order.

    The payload's number of elements must be a multiple of p.
    """


@attrs.frozen(eq=False)
class Broadcast(Collective):
    """Every rank gets the payload of group rank ``src``; the result has the payload's shape and dtype."""

    src: int = attrs.field(default=0, kw_only=True)


def sent_bytes(kind: type[Collective], payload: int, p: int) -> float:
    """Bytes one rank sends for a collective of ``payload`` bytes among ``p`` ranks, bandwidth-optimally.

    An all-reduce costs 2(p-1)/p of its payload, an all-gather (p-1) times its own share, the others (p-1)/p.
    """
    if issubclass(kind, AllReduce):
        return 2 * (p - 1) / p * payload
    if issubclass(kind, AllGather):
        return float((p - 1) * payload)
    return (p - 1) / p * payload
