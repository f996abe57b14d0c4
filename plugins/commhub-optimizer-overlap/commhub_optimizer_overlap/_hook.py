"""The optimizer's step, bucket by bucket."""

from __future__ import annotations

import logging
import weakref
from typing import TYPE_CHECKING, Any

import attrs
import torch
from torch.distributed.optim import ZeroRedundancyOptimizer

from commhub import RegistrationError, create

from ._flags import reduce_with_flags
from ._standin import Members, Update, step_some
from ._watch import Watch

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence

    from torch import Tensor

    from commhub import Bucket, Exchange, Setup

logger = logging.getLogger("commhub")


@attrs.define(eq=False, kw_only=True, slots=False)
class _Overlap:
    """What both hooks are: an inner hook, the optimizers' watches, and the first step that only looks."""

    inner: str = "allreduce"
    _inner: Any = attrs.field(init=False, repr=False, default=None)
    _watches: tuple[Watch, ...] = attrs.field(init=False, repr=False, default=())
    _parameters: tuple[tuple[Tensor, ...], ...] = attrs.field(init=False, repr=False, default=())
    _sends_flags: bool = attrs.field(init=False, repr=False, default=False)
    _begun: bool = attrs.field(init=False, repr=False, default=False)

    def __attrs_post_init__(self) -> None:
        self._inner = create(self.inner)
        if isinstance(self._inner.made[1], _Overlap):
            raise ValueError(f"inner is {self.inner!r}, which steps the optimizer itself. Give one that averages.")

    def prepare(self, setup: Setup) -> None:
        """Prepare the inner hook and watch the optimizers.

        Raises:
            RegistrationError: if an optimizer cannot be stepped bucket by bucket, or is not this model's.
        """
        self._check(setup)
        self._inner.prepare(setup)
        if setup.scaler is not None and setup.scaler.is_enabled():
            if setup.rank == 0:
                logger.info("with a loss scaler no parameter is updated before step(): nothing overlaps")
            return
        self._sends_flags = setup.unused
        self._watches = tuple(self._watch(optimizer) for optimizer in setup.optimizers)
        end = weakref.finalize(self, _release, self._watches)
        end.atexit = False
        setup.at_end(end)
        setup.after_step(self._conclude)
        mine = [{id(p) for group in o.param_groups for p in group["params"]} for o in setup.optimizers]
        self._parameters = tuple(tuple(p for p in setup.parameters if id(p) in ids) for ids in mine)

    def _watch(self, optimizer: torch.optim.Optimizer) -> Watch:
        return Watch.on(optimizer)

    def _check(self, setup: Setup) -> None:
        if not setup.optimizers:
            raise RegistrationError("no optimizer was given. Pass optimizer= to register().")
        trained = {id(parameter) for parameter in setup.parameters}
        seen: set[int] = set()
        for optimizer in setup.optimizers:
            kind = type(optimizer).__name__
            if isinstance(getattr(optimizer, "optim", optimizer), torch.optim.LBFGS):
                raise RegistrationError("LBFGS updates all parameters together, and cannot do so bucket by bucket.")
            theirs = {id(p) for group in optimizer.param_groups for p in group["params"]}
            if not theirs & trained:
                raise RegistrationError(f"the {kind} that was given updates no parameter of this model.")
            if theirs & seen:
                raise RegistrationError(f"a parameter is in two of the optimizers that were given, one a {kind}.")
            seen |= theirs

    def _conclude(self, _step: int) -> None:
        self._begun = True
        for watch, parameters in zip(self._watches, self._parameters, strict=True):
            watch.conclude(parameters)

    def _reduced(self, bucket: Bucket) -> Generator[Any, Any, tuple[bool, ...]]:
        """Average the gradients; return which parameters to step, none in the first step."""
        exchange = self._inner.reduce(bucket)
        if not self._sends_flags:
            yield from exchange
            return (self._overlaps,) * len(bucket.parameters)
        used = yield from reduce_with_flags(exchange, bucket)
        return used if self._overlaps else (False,) * len(used)

    @property
    def _overlaps(self) -> bool:
        """Whether to step early: not in the first step, where a loss scaler or clipping shows itself unharmed."""
        return self._begun and bool(self._watches)


def _release(watches: tuple[Watch, ...]) -> None:
    for watch in watches:
        watch.release()


@attrs.define(eq=False, kw_only=True, slots=False)
class OptimizerOverlap(_Overlap):
    """Average gradients with another hook, and step each bucket's parameters as soon as they are averaged.

    The user's ``optimizer.step()`` stays and does what is left. Parameters end up as they would without overlap.
    """

    _optimizers: tuple[torch.optim.Optimizer, ...] = attrs.field(init=False, repr=False, default=())
    _members: Members | None = attrs.field(init=False, repr=False, default=None)

    def prepare(self, setup: Setup) -> None:
        """Prepare the inner hook and watch the optimizers.

        Raises:
            RegistrationError: if an optimizer cannot be stepped bucket by bucket, or is not this model's.
        """
        super().prepare(setup)
        self._optimizers = setup.optimizers
        self._members = Members(setup.optimizers)

    def _check(self, setup: Setup) -> None:
        super()._check(setup)
        if any(isinstance(optimizer, ZeroRedundancyOptimizer) for optimizer in setup.optimizers):
            raise RegistrationError("ZeroRedundancyOptimizer also sends parameters. Register 'zero_overlap' for it.")

    def reduce(self, bucket: Bucket) -> Exchange:
        """Average with the inner hook, then step the parameters that some rank has used."""
        chosen = yield from self._reduced(bucket)
        if self._watches:
            self._step(bucket, chosen)

    def _step(self, bucket: Bucket, chosen: Sequence[bool]) -> None:
        assert self._members is not None
        places = self._members()
        updates: list[list[Update]] = [[] for _ in self._optimizers]
        left: list[list[Tensor]] = [[] for _ in self._optimizers]
        for parameter, gradient, is_chosen in zip(bucket.parameters, bucket.gradients, chosen, strict=True):
            place = places.get(id(parameter))
            if place is None:
                continue  # no optimizer's, or that of one that is not overlapped
            if is_chosen:
                updates[place[0]].append(Update(place[1], parameter, gradient))
            else:
                left[place[0]].append(parameter)
        for optimizer, watch, some, others in zip(self._optimizers, self._watches, updates, left, strict=True):
            watch.claim([(u.parameter, u.group) for u in some], others, took_part=any(bucket.used))
            step_some(optimizer, some)
