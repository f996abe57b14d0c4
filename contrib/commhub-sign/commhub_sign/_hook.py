"""Signs with error feedback (Karimireddy et al. 2019, arXiv 1901.09847), averaged in two steps."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Any

import attrs
import torch
from torch import Tensor

from commhub import AllGather, AllReduce, AllToAll, Bucket, Exchange, Setup
from commhub.toolkit import ErrorFeedback, Rules

from ._signs import decode, encode

if TYPE_CHECKING:
    from collections.abc import Generator

_SMALL = 1024
"""Elements below which a parameter counts as small."""


def _group_size(_hook: object, field: attrs.Attribute[int], value: int) -> None:
    if value < 8 or value % 8:
        raise ValueError(f"{field.name} is {value}; it must be a multiple of 8.")


def _start_step(_hook: object, field: attrs.Attribute[int], value: int) -> None:
    if value < 0:
        raise ValueError(f"{field.name} is {value}; it must be at least 0.")


class _Groups:
    """One parameter on its way: v, cut into groups, of which every rank sums an equal number."""

    def __init__(self, i: int, values: Tensor, size: int, bucket: Bucket) -> None:
        p, self.place, self.numel = bucket.world_size, i, values.numel()
        self.share = -(-self.numel // (size * p))
        self.all = values.new_zeros(p * self.share, size)
        self.all.view(-1)[: self.numel].copy_(values)
        first = torch.arange(p * self.share, device=values.device).unsqueeze(1) * size
        self.counts = (self.numel - first).clamp(1, size)
        self.own = slice(bucket.rank * self.share, (bucket.rank + 1) * self.share)
        self.start = min(self.own.start * size, self.numel)
        self.end = min(self.own.stop * size, self.numel)
        self.missed = self.all

    def encode(self) -> Tensor:
        """Codes of all groups (groups, bytes); ``all`` holds afterwards what they miss."""
        coded = encode(self.all, self.counts)
        self.all -= decode(coded, self.all.dtype)
        return coded

    def encode_mean(self, received: Tensor, divisor: int) -> Tensor:
        """Codes of the mean of this rank's groups, from what all ranks sent of them (p, bytes); keeps the rest."""
        mean = torch.zeros_like(self.all[self.own])
        for coded in received:
            mean += decode(coded.view(self.share, -1), mean.dtype).mul_(1 / divisor)
        mean.view(-1)[self.end - self.start :] = 0  # what fills the last group is no part of its scale
        coded = encode(mean, self.counts[self.own])
        self.missed = (mean - decode(coded, mean.dtype)).mul_(divisor).view(-1)[: self.end - self.start]
        return coded

    def decode(self, gathered: Tensor) -> Tensor:
        """The result (1-D) from all ranks' codes (p, bytes)."""
        coded = gathered.reshape(len(self.all), -1)
        return decode(coded, self.all.dtype).view(-1)[: self.numel]


@attrs.define(eq=False, kw_only=True, slots=False)
class Sign:
    """Average gradients as signs and a scale per group, in two messages of that size, for any number of ranks.

    The ranks share the work of summing; each owns as many groups of every parameter:

    1. add what former steps left unsent: v = gradient + residual
    2. for each group send sign(v) and the mean of |v|, to the rank that owns it: one all-to-all
    3. average what came, in float32 or wider
    4. encode the mean in the same way and send it to all ranks: one all-gather
    5. the result is scale times sign; the owner too takes it from there, so that all ranks have the same bits
    6. residual = v - decoded v. The owner adds what step 4 missed, times the ranks, for only it will send that

    Steps 1, 2 and 6 are EF-signSGD (arXiv 1901.09847); both directions are compressed as in 1-bit Adam (Tang et al.
    2021, arXiv 2102.02888).

    Args:
        group_size: elements that share a scale, a multiple of 8.
        dense_small: average vectors and parameters of less than 1024 elements exactly; complex ones always are.
        start_step: this many steps are averaged exactly first.
        rules: by glob on parameter names, ``"dense"`` for what is averaged exactly.

    Raises:
        ValueError: if an option is out of range.
    """

    group_size: int = attrs.field(default=64, validator=_group_size)
    dense_small: bool = True
    start_step: int = attrs.field(default=1000, validator=_start_step)
    rules: dict[str, object] = attrs.field(default={}, validator=attrs.validators.instance_of(dict))
    _rules: Rules = attrs.field(init=False, repr=False, default=None)  # set when all is known
    _compressed: frozenset[str] = attrs.field(init=False, default=frozenset(), repr=False)
    _feedback: ErrorFeedback = attrs.field(init=False, default=None, repr=False)  # set by prepare

    def __attrs_post_init__(self) -> None:
        self._rules = Rules(self.rules, {})

    def prepare(self, setup: Setup) -> None:
        """Choose what is compressed; allocate residuals."""
        dense = self._rules.dense(setup.names)
        self._compressed = frozenset(
            name
            for name, shape, dtype in zip(setup.names, setup.shapes, setup.dtypes, strict=True)
            if name not in dense
            and dtype.is_floating_point
            and 0 not in shape
            and not (self.dense_small and (len(shape) < 2 or prod(list(shape)) < _SMALL))
        )
        self._feedback = ErrorFeedback(setup, [name for name in setup.names if name in self._compressed])

    def reduce(self, bucket: Bucket) -> Exchange:
        """An all-to-all and an all-gather of bytes; beside the first an all-reduce of what is averaged exactly."""
        started = bucket.step >= self.start_step
        coded = [i for i, name in enumerate(bucket.names) if started and name in self._compressed]
        if not coded:
            bucket.flat.copy_((yield AllReduce(bucket.flat)))
            return
        dense = [segment for i, segment in enumerate(bucket.segments) if i not in coded]

        # 1. What this rank has to give. 2. Its signs, to the ranks that own the groups.
        groups = [_Groups(i, self._feedback.compensated(bucket, i), self.group_size, bucket) for i in coded]
        shares = [one.encode().view(bucket.world_size, -1) for one in groups]
        sizes = [share.shape[1] for share in shares]
        exact = torch.cat(dense) if dense else bucket.flat.new_empty(0)
        received = yield from _beside(AllToAll(torch.cat(shares, 1).view(-1)), exact)

        # 3. The mean of the groups that this rank owns. 4. Its signs, to all.
        theirs = received.view(bucket.world_size, -1).split(sizes, 1)
        own = [one.encode_mean(some, bucket.divisor) for one, some in zip(groups, theirs, strict=True)]
        gathered = yield AllGather(torch.cat([codes.view(-1) for codes in own]))

        # 5. The result. 6. What was not sent.
        parts = gathered.view(bucket.world_size, -1).split(sizes, 1)
        results = [one.decode(part).to(bucket.flat.dtype) for one, part in zip(groups, parts, strict=True)]
        for result in results:
            bucket.finite = bucket.finite & result.isfinite().all()
        for one, result in zip(groups, results, strict=True):
            self._keep(bucket, one)
            bucket.segments[one.place].copy_(result)
        for segment, mean in zip(dense, exact.split([segment.numel() for segment in dense]), strict=True):
            segment.copy_(mean)

    def _keep(self, bucket: Bucket, one: _Groups) -> None:
        unsent = one.all.view(-1)[: one.numel]
        if bucket.used[one.place]:
            unsent[one.start : one.end] += one.missed
        elif one.end > one.start:  # its own residual waits; what the mean's signs missed comes on top
            self._feedback.deposit(bucket, one.place, one.start, one.missed)
        self._feedback.keep(bucket, one.place, unsent)


def _beside(collective: AllToAll, exact: Tensor) -> Generator[Any, Any, Tensor]:
    """The result of ``collective``; in the same breath ``exact`` is averaged in place, if there is any of it."""
    if not exact.numel():
        result: Tensor = yield collective
        return result
    result, mean = yield (collective, AllReduce(exact))
    exact.copy_(mean)
    return result
