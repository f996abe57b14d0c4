"""A collective made ready to send: checked, averaged, cast. And its result turned back into what the hook expects.

Everything that is the same for every way of communicating is here, once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

import attrs
import torch
from torch import Tensor

from commhub._errors import HookError
from commhub.protocol._collectives import Collective, Subgroup

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from commhub.protocol._bucket import Bucket

T = TypeVar("T")


class Scratch:
    """Buffers for casts, kept between steps: a fresh 25 MiB costs more in page faults than the cast itself."""

    def __init__(self) -> None:
        self._free: dict[tuple[int, torch.dtype, torch.device], list[Tensor]] = {}

    def take(self, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A 1-D tensor, its content undefined."""
        free = self._free.get((numel, dtype, device))
        return free.pop() if free else torch.empty(numel, dtype=dtype, device=device)

    def give(self, tensor: Tensor) -> None:
        """Hand back what ``take`` gave."""
        if tensor.device.type == "cpu":  # a device's caching allocator does this better, and knows of streams
            self._free.setdefault((tensor.numel(), tensor.dtype, tensor.device), []).append(tensor)


@attrs.define(eq=False)
class Job:
    """One collective on its way.

    Attributes:
        kind: which one.
        group: the subgroup, or ``None`` for all ranks.
        p: how many ranks take part.
        payload: 1-D, real, contiguous, in the dtype that travels; an in-place kind may leave its result in it.
        sent_bytes: what this rank sends.
        asked: what the hook yielded.
        raw: the result as it travelled, where whoever carries the job out leaves it here.
        apart: whether to give every result in memory of its own, and spoil the payload: a hook that goes on with what
            it yielded is found out.
    """

    kind: type[Collective]
    group: Subgroup | None
    p: int
    payload: Tensor
    sent_bytes: float
    asked: Collective
    _scratch: Scratch
    raw: Tensor | None = None
    apart: bool = False

    def result(self, raw: Tensor) -> Tensor:
        """What the hook is sent: ``raw`` (1-D, as it travelled) in the payload's dtype, complex again if it was.

        An in-place kind gives back the very tensor that was yielded, unless results are kept apart.
        """
        tensor = self.asked.tensor
        in_place = self.kind.in_place
        if in_place and not self.apart:
            if raw.data_ptr() != tensor.data_ptr() or raw.dtype != tensor.dtype:
                _real(tensor).copy_(raw)
        else:
            real = torch.view_as_real(tensor).dtype if tensor.is_complex() else tensor.dtype
            result = raw.to(real)
            made = torch.view_as_complex(result.view(-1, 2)) if tensor.is_complex() else result
            if self.apart:
                _spoil(tensor)
            tensor = made.view(tensor.shape) if in_place else made
        if self.payload.data_ptr() != self.asked.tensor.data_ptr():
            self._scratch.give(self.payload)
        return tensor

    def alone(self) -> Tensor:
        """What comes of it, as it would have travelled, where there is nobody else or nothing to send."""
        return self.payload if self.kind.in_place else self.payload.clone()


def way(table: Mapping[type[Collective], T], kind: type[Collective], driver: str) -> T:
    """How a driver carries out a kind: what its table has for exactly this one.

    Args:
        table: the driver's.
        kind: which is asked for.
        driver: who it is, after "cannot be carried out".

    Raises:
        HookError: if it does not know this kind.
    """
    found = table.get(kind)
    if found is None:
        others = ", ".join(sorted(known.__name__ for known in table))
        raise HookError(f"yielded {kind.__name__}, which cannot be carried out {driver}. Yield one of {others}.")
    return found


def sum_shares(shares: Sequence[Tensor]) -> Tensor:
    """The sum of equally long tensors in their order, 16-bit ones in float32. The result is a new tensor."""
    first = shares[0]
    wide = torch.promote_types(first.dtype, torch.float32) if first.is_floating_point() else first.dtype
    total = first.to(wide, copy=True)
    for share in shares[1:]:
        total += share
    return total


def _spoil(payload: Tensor) -> None:
    """Fill with what is no number, or in integers with a number that nobody meant."""
    odd = 1 if payload.dtype == torch.bool else 0xFF if payload.is_floating_point() or payload.is_complex() else 0x7F
    payload.view(-1).view(torch.uint8).fill_(odd)


def _real(tensor: Tensor) -> Tensor:
    return (torch.view_as_real(tensor) if tensor.is_complex() else tensor).view(-1)


def make_job(request: object, bucket: Bucket, world: int, wire: torch.dtype | None, scratch: Scratch) -> Job:
    """Check what a hook yielded and make it ready: mean first, cast after.

    Args:
        request: what the hook yielded, or one element of a tuple it yielded.
        bucket: the bucket it belongs to.
        world: ranks of the whole group.
        wire: the registration's wire dtype, for floating payloads that are wider and name none of their own.
        scratch: where buffers for casts come from.

    Raises:
        HookError: if it is no collective that can be carried out, saying what to yield instead.
    """
    collective = _checked(request, bucket)
    tensor = collective.tensor
    payload = _real(tensor)
    p = world if collective.group is None else len(collective.group)
    kind = type(collective)
    if objection := collective.objection(p):
        raise HookError(f"yielded {objection}")
    if collective.op == "mean":
        if not payload.is_floating_point():
            raise HookError(
                f"yielded {kind.__name__}(op='mean') of {payload.dtype}. Use op='sum', or a floating dtype."
            )
        divisor = bucket.divisor if collective.group is bucket.group or collective.group is None else p
        if divisor != 1 and bucket.divides:
            payload.div_(divisor)
        elif divisor != 1:
            payload.mul_(1.0 / divisor)
    narrow = collective.wire if collective.wire is not None else wire
    if narrow is not None and payload.is_floating_point() and narrow.itemsize < payload.dtype.itemsize:
        payload = scratch.take(payload.numel(), narrow, payload.device).copy_(payload)
    return Job(kind, collective.group, p, payload, kind.sent_bytes(payload.nbytes, p), collective, scratch)


def _checked(request: object, bucket: Bucket) -> Collective:
    if not isinstance(request, Collective) or type(request) is Collective:
        raise HookError(
            f"yielded {type(request).__name__}. Yield a collective such as AllReduce(bucket.flat), or a tuple."
        )
    tensor = request.tensor
    name = type(request).__name__
    if not isinstance(tensor, Tensor) or tensor.layout is not torch.strided:
        raise HookError(f"yielded {name} of {type(tensor).__name__}. Its first argument is a dense tensor.")
    if tensor.device != bucket.flat.device:
        raise HookError(f"yielded {name} on {tensor.device} for a bucket on {bucket.flat.device}. Keep it there.")
    if not tensor.is_contiguous():
        raise HookError(f"yielded {name} of a tensor that is not contiguous. Call .contiguous() on it.")
    if request.wire is not None and not request.wire.is_floating_point:
        raise HookError(f"yielded {name}(wire={request.wire}). A wire dtype is floating, such as torch.float16.")
    return request
