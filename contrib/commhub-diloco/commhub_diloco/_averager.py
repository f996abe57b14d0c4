"""DiLoCo: every so many local steps, one step of an outer optimizer, from what all ranks have moved on average."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs
import torch

import commhub
from commhub import AllReduce

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torch import Tensor

    from commhub import Bucket, Exchange, Setup, State, Subgroup


@attrs.define
class DiLoCo:
    """DiLoCo (Douillard et al. 2023, arXiv 2311.08105); with fragments, streaming (2025, arXiv 2501.18512).

    All ranks keep the same global parameters, at first those that training begins with, and take ``period`` steps.

    1. Outer gradient: the global parameters minus the rank's own, averaged among all ranks by ``exchange``.
    2. Outer step: SGD with Nesterov momentum takes the global parameters along it.
    3. Every rank goes on from the global parameters.

    Global parameters and momentum are kept in float32 or wider. If an outer gradient is not finite on some rank, they
    stay as they are, and the ranks go back to them.

    Args:
        period: local steps between two outer steps of a parameter.
        outer_lr, outer_momentum: of the outer SGD.
        warmup_steps: these end with a plain average; the outer steps begin from there.
        fragments: the model is cut into so many parts of about equal size, which take their outer steps in turn, one in
            every ``period / fragments`` steps.
        exchange: a hook string.

    Raises:
        HookOptionError: if ``fragments`` does not divide ``period`` or exceeds the number of parameters, or
            ``exchange`` is an averager.
    """

    period: int = attrs.field(default=500, validator=attrs.validators.ge(1))
    outer_lr: float = attrs.field(default=0.7, validator=[attrs.validators.gt(0), attrs.validators.lt(float("inf"))])
    outer_momentum: float = attrs.field(default=0.9, validator=[attrs.validators.ge(0), attrs.validators.lt(1)])
    warmup_steps: int = attrs.field(default=0, validator=attrs.validators.ge(0))
    fragments: int = attrs.field(default=1, validator=attrs.validators.ge(1))
    exchange: str = "allreduce"
    _exchange: Any = attrs.field(init=False, repr=False, eq=False)
    _group: Subgroup | None = attrs.field(default=None, init=False, repr=False, eq=False)
    _state: State | None = attrs.field(default=None, init=False, repr=False, eq=False)
    _turns: dict[str, int] = attrs.field(factory=dict, init=False, repr=False, eq=False)
    _unknown: set[str] = attrs.field(factory=set, init=False, repr=False, eq=False)

    def __attrs_post_init__(self) -> None:
        if self.period % self.fragments:
            raise ValueError(
                f"fragments is {self.fragments}, which does not divide period={self.period}. Choose one that does."
            )
        self._exchange = commhub.create(self.exchange)
        if callable(getattr(self._exchange, "due", None)):
            raise ValueError(
                f"exchange is {self.exchange!r}, which averages parameters. Name a hook such as 'allreduce'."
            )

    @property
    def partial(self) -> bool:
        """Whether an average leaves parameters out."""
        return self.fragments > 1

    def prepare(self, setup: Setup) -> None:
        """Keep room for global parameters. A simulation has none; there the first average is the first of them."""
        if self.fragments > max(len(setup.names), 1):
            raise commhub.HookOptionError(
                f"diloco: fragments={self.fragments}, and the model has {len(setup.names)} parameters. Choose fewer."
            )
        self._group, self._state = setup.partition([range(setup.world_size)]), setup.state
        self._unknown = set(setup.names)
        sizes = [torch.Size(shape).numel() for shape in setup.shapes]
        self._turns = dict(zip(setup.names, _cut(sizes, self.fragments), strict=True))
        for i, name in enumerate(setup.names):
            dtype = torch.promote_types(setup.dtypes[i], torch.float32)
            momentum = torch.zeros(sizes[i], dtype=dtype, device=setup.device)
            kept = torch.empty_strided(setup.shapes[i], setup.strides[i], dtype=dtype, device=setup.device)
            entries = setup.state.shared(name)
            entries["global"] = kept
            entries["momentum"] = momentum.as_strided(kept.shape, kept.stride())
        if setup.parameters:
            self.begin(dict(zip(setup.names, (p.detach() for p in setup.parameters), strict=True)))
        self._exchange.prepare(setup)

    def begin(self, parameters: Mapping[str, Tensor]) -> None:
        """Go out from these parameters, without momentum: training begins, or goes on from weights that were loaded."""
        for name, value in parameters.items():
            if name in self._turns:
                self._entries(name)["global"].copy_(value)
                self._entries(name)["momentum"].zero_()
        self._unknown.difference_update(parameters)

    def due(self, step: int) -> Subgroup | None:
        """All ranks, at the end of the warm-up and in every ``period / fragments`` steps from there."""
        since = step + 1 - self.warmup_steps
        return (
            self._group if since >= (self.warmup_steps == 0) and since % (self.period // self.fragments) == 0 else None
        )

    def reduce(self, bucket: Bucket) -> Exchange:
        """Leave in ``bucket.flat`` the new global parameters of those whose turn it is."""
        # Asked for among all ranks and not by the timetable, it is the last average: then it is everyone's turn.
        since = bucket.step + 1 - self.warmup_steps
        turn = (
            None if bucket.group is None or since <= 0 else (since * self.fragments // self.period - 1) % self.fragments
        )
        for part in _runs(bucket, [turn in (None, self._turns[name]) for name in bucket.names]):
            if since <= 0 or not self._unknown.isdisjoint(part.names):
                part.flat.copy_((yield AllReduce(part.flat, wire=torch.float64)))
                self._first(part)
            else:
                yield from self._outer_step(part)

    def _first(self, part: Bucket) -> None:
        for name, value in zip(part.names, part.gradients, strict=True):
            self._entries(name)["global"] = value.to(self._entries(name)["global"].dtype, copy=True)
        self._unknown.difference_update(part.names)

    def _outer_step(self, part: Bucket) -> Exchange:
        # 1. The outer gradient, averaged.
        wide = part.to(torch.promote_types(part.flat.dtype, torch.float32))
        for name, gradient in zip(part.names, wide.gradients, strict=True):
            torch.sub(self._entries(name)["global"], gradient, out=gradient)
        yield from self._exchange.reduce(wide)
        # 2. SGD with Nesterov momentum, as torch.optim.SGD has it. What is assigned here counts if all is finite.
        for name, gradient, parameter in zip(part.names, wide.gradients, part.gradients, strict=True):
            entries = self._entries(name)
            # Products are rounded before they are added: some processors would add at once, and ranks would differ.
            momentum = entries["momentum"].mul(self.outer_momentum).add_(gradient)
            step = momentum.mul(self.outer_momentum).add_(gradient).mul_(self.outer_lr)
            moved = entries["global"].sub(step)
            # 3. All ranks go on from there, or from where they last were.
            parameter.copy_(torch.where(part.finite, moved, entries["global"]))
            entries["momentum"], entries["global"] = momentum, moved

    def _entries(self, name: str) -> Any:
        assert self._state is not None
        return self._state.shared(name)


def _cut(sizes: Sequence[int], count: int) -> list[int]:
    """For each parameter its fragment: adjacent ones, of about equal size, none empty."""
    total, before, fragment, fragments = max(sum(sizes), 1), 0, -1, []
    for i, size in enumerate(sizes):
        left = len(sizes) - i
        wanted = (before + size / 2) * count // total
        fragment = max(min(int(wanted), fragment + 1, count - 1), fragment, count - left, 0)
        fragments.append(fragment)
        before += size
    return fragments


def _runs(bucket: Bucket, chosen: Sequence[bool]) -> Iterator[Bucket]:
    """Parts of a bucket: the chosen parameters, adjacent ones together."""
    start = None
    for i, taken in enumerate([*chosen, False]):
        if taken and start is None:
            start = i
        elif not taken and start is not None:
            yield bucket.part(bucket.parameters[start:i])
            start = None
