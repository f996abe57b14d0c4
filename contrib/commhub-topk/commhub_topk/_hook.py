"""Top-k sparsification with error feedback and momentum correction (Lin et al. 2018, arXiv 1712.01887)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs
import torch
from torch import Tensor

from commhub import AllGather, AllReduce, Bucket, Exchange, Setup
from commhub.toolkit import ErrorFeedback, Rules, Selection

from ._places import InTurn, Largest
from ._velocity import Velocities

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence

    Means = Generator[Any, Any, list[Tensor]]

_INDEXED = 2**31
"""Elements that 32-bit indices tell apart; a larger parameter is averaged exactly."""


def _share(_hook: object, field: attrs.Attribute[float], value: float) -> None:
    if not 0 < value <= 1:
        raise ValueError(f"{field.name} is {value}; it must be above 0 and at most 1.")


def _decay(_hook: object, field: attrs.Attribute[float], value: float) -> None:
    if not 0 <= value < 1:
        raise ValueError(f"{field.name} is {value}; it must be at least 0 and below 1.")


def _at_least(least: int) -> Any:
    def check(_hook: object, field: attrs.Attribute[int], value: int) -> None:
        if value < least:
            raise ValueError(f"{field.name} is {value}; it must be at least {least}.")

    return check


@attrs.define(eq=False, kw_only=True, slots=False)
class TopK:
    """Average the elements of the largest magnitude, each rank's own; the others wait and add up.

    For each parameter:

    1. v = gradient + residual. With momentum m: u = m u + gradient, and v = accumulated + u
    2. choose the k elements of v that are largest in magnitude
    3. gather the ranks' values and indices: one message
    4. the result is the sum of all contributions in the ranks' order, divided by their number, and zero elsewhere
    5. keep v where nothing was sent. With momentum: and forget u where something was

    This is Deep Gradient Compression (arXiv 1712.01887); without momentum it is top-k with memory (Stich et al. 2018,
    arXiv 1809.07599). With ``shared`` all ranks send the same blocks, which they take in turn in a random order, so
    that no indices travel and an all-reduce takes the place of step 3, with bytes that do not grow with the ranks.

    Args:
        ratio: k over the number of elements, in (0, 1].
        momentum: m in [0, 1), of the velocities. The optimizer is then plain SGD. What is averaged exactly has one too.
        min_numel: parameters with fewer elements, and complex ones, are averaged exactly.
        start_step: this many steps are averaged exactly first.
        shared: send the same blocks on all ranks.
        seed: of the blocks' order.
        rules: by glob on parameter names, ``"dense"`` for what is averaged exactly.

    Raises:
        ValueError: if an option is out of range.
    """

    ratio: float = attrs.field(default=0.01, validator=_share)
    momentum: float = attrs.field(default=0.0, validator=_decay)
    min_numel: int = attrs.field(default=1024, validator=_at_least(1))
    start_step: int = attrs.field(default=1000, validator=_at_least(0))
    shared: bool = False
    seed: int = 0
    rules: dict[str, object] = attrs.field(default={}, validator=attrs.validators.instance_of(dict))
    _selection: Selection = attrs.field(init=False, repr=False, default=None)  # set when all is known
    _velocities: Velocities | None = attrs.field(init=False, default=None, repr=False)
    _feedback: ErrorFeedback | None = attrs.field(init=False, default=None, repr=False)
    _places: Largest | InTurn = attrs.field(init=False, default=None, repr=False)  # set by prepare

    def __attrs_post_init__(self) -> None:
        self._selection = Selection(Rules(self.rules, {}), self.min_numel, self.start_step, max_numel=_INDEXED - 1)

    def prepare(self, setup: Setup) -> None:
        """Choose what is compressed; allocate what is remembered."""
        chosen = [*self._selection.choose(setup)]
        if self.momentum:
            self._velocities = Velocities(setup, chosen, self.momentum)
        else:
            self._feedback = ErrorFeedback(setup, chosen)
        self._places = InTurn(setup, chosen, self.ratio, self.seed) if self.shared else Largest(self.ratio)

    def reduce(self, bucket: Bucket) -> Exchange:
        """One all-gather, and beside it one all-reduce of what is averaged exactly, if there is any."""
        sparse = self._selection.places(bucket)
        if self._velocities is not None:
            for i in set(range(len(bucket.names))).difference(sparse):
                bucket.segments[i].copy_(self._velocities.advance(bucket, i))
        if not sparse:
            yield from self._selection.exactly(bucket)
            return

        # 1. What this rank has to give. 2. What it sends of that.
        values = [self._compensated(bucket, i) for i in sparse]
        places = [self._places.of(bucket.names[i], v) for i, v in zip(sparse, values, strict=True)]

        # 3. One message, and one of what is averaged exactly. 4. The mean.
        average = self._average_shared if self.shared else self._average_gathered
        means = yield from average(bucket, values, places)
        means = [mean.to(bucket.flat.dtype) for mean in means]
        for mean in means:
            bucket.finite = bucket.finite & mean.isfinite().all()

        # 5. Keep what was not sent.
        for i, v, where, mean in zip(sparse, values, places, means, strict=True):
            self._keep(bucket, i, v.index_fill_(0, where, 0), where)
            bucket.segments[i].copy_(mean)

    def _average_gathered(self, bucket: Bucket, values: Sequence[Tensor], places: Sequence[Tensor]) -> Means:
        """Each parameter's mean (1-D) from all ranks' values and indices."""
        sent = torch.cat([v[where] for v, where in zip(values, places, strict=True)])
        indices = torch.cat([*places]).to(torch.int32)
        message = torch.cat([sent.view(torch.int32), indices])
        gathered = yield from self._selection.beside(bucket, AllGather(message))
        shares = gathered.view(-1, message.numel())
        theirs = shares[:, : -len(indices)].reshape(-1).view(sent.dtype).view(len(shares), -1).mul_(1 / bucket.divisor)
        counts = [len(where) for where in places]
        means = [torch.zeros_like(v) for v in values]
        for given, at in zip(theirs, shares[:, -len(indices) :], strict=True):
            for mean, some, where in zip(means, given.split(counts), at.split(counts), strict=True):
                mean.index_add_(0, where, some)
        return means

    def _average_shared(self, bucket: Bucket, values: Sequence[Tensor], places: Sequence[Tensor]) -> Means:
        """Each parameter's mean (1-D) at places that all ranks share."""
        sent = [v[where] for v, where in zip(values, places, strict=True)]
        for v, some in zip(values, sent, strict=True):
            # What waits must reach all ranks too if it is not finite: NaN goes in its place.
            some[:1] += torch.where(v.isfinite().all(), 0.0, torch.nan)
        mean = yield from self._selection.beside(bucket, AllReduce(torch.cat(sent)))
        shares = mean.split([len(where) for where in places])
        return [
            torch.zeros_like(v).index_copy_(0, where, some)
            for v, where, some in zip(values, places, shares, strict=True)
        ]

    def _compensated(self, bucket: Bucket, i: int) -> Tensor:
        if self._velocities is not None:
            return self._velocities.compensated(bucket, i)
        assert self._feedback is not None
        return self._feedback.compensated(bucket, i)

    def _keep(self, bucket: Bucket, i: int, unsent: Tensor, places: Tensor) -> None:
        if self._velocities is not None:
            self._velocities.keep(bucket, i, unsent, places)
        else:
            assert self._feedback is not None
            self._feedback.keep(bucket, i, unsent)
