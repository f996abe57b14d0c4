"""The collectives a hook may ask for, as values.

A hook yields these instead of calling ``torch.distributed``; a driver carries them out. Each kind declares here all
that drivers, figures and checks need to know of it; how it is carried out is a line in the table of each driver. This
module imports no torch at run time, so that the command line can describe hooks without loading it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

import attrs

from commhub._errors import HookOptionError
from commhub._printable import shown

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


def foreign(group: Subgroup) -> str:
    """What to say of a subgroup that a hook was not given here."""
    return (
        f"ranks {shown(group.ranks)}, which is no subgroup of this rank in this registration. Use what setup.partition "
        "returned in this hook's prepare."
    )


def _op(instance: object, _attribute: attrs.Attribute[str], value: object) -> None:
    if not isinstance(value, str) or value not in ("mean", "sum"):
        raise HookOptionError(f"{type(instance).__name__}: op is {shown(value)}; it is 'mean' or 'sum'.")


@attrs.frozen(eq=False)
class Collective:
    """What every collective carries, and what every kind of them declares.

    A class that derives from this is a kind of its own, also where it derives from another kind: drivers look it up by
    its exact type, and refuse the kinds that they do not know.

    Attributes:
        tensor: the payload, contiguous, of any shape; the driver's until the hook is resumed, and undefined after.
        wire: a narrower floating dtype to send the payload in; ``None`` leaves that to the registration's ``wire``.
        group: a subgroup from ``setup.partition``; ``None`` means all ranks of the bucket.
        in_place: of the kind, whether the result comes back in ``tensor``, with its shape; otherwise it is 1-D and new.
        alike: of the kind, whether all ranks of the group get the same result.
        in_shares: of the kind, whether the payload is cut in p equal shares.
    """

    in_place: ClassVar[bool] = False
    alike: ClassVar[bool] = False
    in_shares: ClassVar[bool] = False

    tensor: torch.Tensor
    wire: torch.dtype | None = attrs.field(default=None, kw_only=True)
    group: Subgroup | None = attrs.field(default=None, kw_only=True)

    @property
    def op(self) -> Op | None:
        """How payloads are reduced; ``None`` where they are only moved.

        Before ``"mean"`` the driver multiplies the payload by 1/divisor; what is carried out is then a sum.
        """
        return None

    @property
    def manner(self) -> str:
        """In words, what else all ranks must ask for alike, besides kind, group, elements and dtype; empty if nothing.

        Ranks compare it, and errors show it.
        """
        return ""

    def objection(self, p: int) -> str:
        """Why it cannot be carried out among p ranks, and what to do, beginning with its name; empty if it can be."""
        if self.in_shares and (numel := self.tensor.numel()) % p:
            return f"{type(self).__name__} of {numel} elements among {p} ranks. Pad to a multiple of {p}."
        return ""

    @classmethod
    def sent_bytes(cls, payload: int, p: int) -> float:
        """Bytes one rank sends for a payload of so many bytes among p ranks, bandwidth-optimally.

        Raises:
            NotImplementedError: if the kind does not declare it.
        """
        raise NotImplementedError(f"{cls.__name__} does not declare what a rank sends; define its sent_bytes().")

    @classmethod
    def result_numel(cls, numel: int, p: int) -> int:  # noqa: ARG003 - of other kinds it depends on p
        """Elements of the result for a payload of so many elements among p ranks; in proportion to the payload's."""
        return numel


@attrs.frozen(eq=False)
class AllReduce(Collective):
    """Sum or average over the group; the result has the payload's shape and dtype.

    ``op="mean"`` multiplies by 1/divisor before any cast, so that a mean that fits the wire dtype never overflows. A
    rank sends 2(p-1)/p of its payload.
    """

    in_place: ClassVar[bool] = True
    alike: ClassVar[bool] = True

    op: Op = attrs.field(default="mean", kw_only=True, validator=_op)

    @classmethod
    def sent_bytes(cls, payload: int, p: int) -> float:
        """A reduce-scatter, and as much again to gather."""
        return 2 * (p - 1) / p * payload


@attrs.frozen(eq=False)
class ReduceScatter(Collective):
    """Sum or average over the group; rank i of the group gets the i-th of p equal shares, 1-D.

    The payload's number of elements must be a multiple of p. A rank sends (p-1)/p of its payload.
    """

    in_shares: ClassVar[bool] = True

    op: Op = attrs.field(default="mean", kw_only=True, validator=_op)

    @classmethod
    def sent_bytes(cls, payload: int, p: int) -> float:
        """All shares but its own."""
        return (p - 1) / p * payload

    @classmethod
    def result_numel(cls, numel: int, p: int) -> int:
        """One share."""
        return numel // p


@attrs.frozen(eq=False)
class AllGather(Collective):
    """Every rank gets all payloads, concatenated in group-rank order: 1-D, p times the payload's elements.

    A rank sends p-1 times its payload.
    """

    alike: ClassVar[bool] = True

    @classmethod
    def sent_bytes(cls, payload: int, p: int) -> float:
        """Its payload, to each of the others."""
        return float((p - 1) * payload)

    @classmethod
    def result_numel(cls, numel: int, p: int) -> int:
        """Every rank's."""
        return numel * p


@attrs.frozen(eq=False)
class AllToAll(Collective):
    """Share j of the payload (of p equal ones) goes to rank j; the result, 1-D, holds the shares in group-rank order.

    The payload's number of elements must be a multiple of p. A rank sends (p-1)/p of its payload.
    """

    in_shares: ClassVar[bool] = True

    @classmethod
    def sent_bytes(cls, payload: int, p: int) -> float:
        """All shares but its own."""
        return (p - 1) / p * payload


@attrs.frozen(eq=False)
class Broadcast(Collective):
    """Every rank gets the payload of group rank ``src``; the result has the payload's shape and dtype.

    A rank sends (p-1)/p of its payload, on average.
    """

    in_place: ClassVar[bool] = True
    alike: ClassVar[bool] = True

    src: int = attrs.field(default=0, kw_only=True)

    @property
    def manner(self) -> str:
        """From which rank."""
        return f"from {self.src}" if self.src else ""

    def objection(self, p: int) -> str:
        """That ``src`` is no rank of the group."""
        if not 0 <= self.src < p:
            return f"Broadcast(src={self.src}) among {p} ranks. Give a rank of the group."
        return ""

    @classmethod
    def sent_bytes(cls, payload: int, p: int) -> float:
        """As if each rank passed on its part of it."""
        return (p - 1) / p * payload
