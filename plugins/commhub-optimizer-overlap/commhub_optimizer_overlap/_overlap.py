"""What both hooks are: an inner hook, the optimizers' watches, and a first step that only looks."""

from __future__ import annotations

import logging
import weakref
from typing import TYPE_CHECKING, Any, ClassVar

import attrs
import torch
from torch.distributed.optim import ZeroRedundancyOptimizer

from commhub import RegistrationError, create

from ._flags import reduce_with_flags
from ._undo import Undo
from ._watch import Watch

if TYPE_CHECKING:
    from collections.abc import Generator

    from torch import Tensor

    from commhub import Bucket, Setup

logger = logging.getLogger("commhub")


@attrs.define(eq=False, kw_only=True, slots=False)
class Overlap:
    """The base of the hooks: averages with an inner hook and knows when to step early.

    Attributes:
        steps_optimizer: gradients have been used when backward ends, so that clipping them comes too late; for those
            who run the loop and clip, as frameworks do.
    """

    steps_optimizer: ClassVar[bool] = True

    inner: str = "allreduce"
    undo: bool = True
    _inner: Any = attrs.field(init=False, repr=False, default=None)
    _watches: tuple[Watch, ...] = attrs.field(init=False, repr=False, default=())
    _parameters: tuple[tuple[Tensor, ...], ...] = attrs.field(init=False, repr=False, default=())
    _sends_flags: bool = attrs.field(init=False, repr=False, default=False)
    _is_early: bool = attrs.field(init=False, repr=False, default=False)
    _begun: bool = attrs.field(init=False, repr=False, default=False)
    _undo: Undo = attrs.field(init=False, repr=False, factory=Undo)

    def __attrs_post_init__(self) -> None:
        self._inner = create(self.inner)
        if isinstance(self._inner.made[1], Overlap):
            raise ValueError(f"inner is {self.inner!r}, which steps the optimizer itself. Give one that averages.")
        if callable(getattr(self._inner, "due", None)):
            raise ValueError(f"inner is {self.inner!r}, which averages parameters. Name a hook such as 'fp16'.")

    def prepare(self, setup: Setup) -> None:
        """Prepare the inner hook and watch the optimizers.

        Raises:
            RegistrationError: if an optimizer cannot be stepped bucket by bucket, or is not this model's.
        """
        if not setup.parameters:  # a simulation, which has gradients only: there is nothing to step
            self._prepare_inner(setup)
            return
        self._check(setup)
        self._prepare_inner(setup)
        self._is_early = setup.scaler is None or not setup.scaler.is_enabled()
        if not self._is_early and setup.rank == 0:
            logger.info("with a loss scaler no parameter is updated before step(): nothing overlaps")
        if not self._is_early and not self._needs_watches():
            return
        self._sends_flags = setup.unused and self._is_early
        self._watches = tuple(self._watch(optimizer) for optimizer in setup.optimizers)
        end = weakref.finalize(self, _release, self._watches)
        end.atexit = False
        setup.at_end(end)
        setup.after_step(self._conclude)
        setup.settle(self._settle)
        mine = [{id(p) for group in o.param_groups for p in group["params"]} for o in setup.optimizers]
        self._parameters = tuple(tuple(p for p in setup.parameters if id(p) in ids) for ids in mine)

    def _prepare_inner(self, setup: Setup) -> None:
        self._inner.prepare(setup)

    def _needs_watches(self) -> bool:
        """Whether there is something to do in step() even where nothing is stepped early."""
        return False

    def _watch(self, optimizer: torch.optim.Optimizer) -> Watch:
        return Watch.on(optimizer, is_scaled=not self._is_early)

    def _check(self, setup: Setup) -> None:
        if not setup.optimizers:
            raise RegistrationError("no optimizer was given. Pass optimizer= to register().")
        trained = {id(parameter) for parameter in setup.parameters}
        seen: set[int] = set()
        for optimizer in setup.optimizers:
            kind = type(optimizer).__name__
            inside = next((v for v in vars(optimizer).values() if isinstance(v, torch.optim.Optimizer)), None)
            if isinstance(optimizer if inside is None else inside, torch.optim.LBFGS):
                raise RegistrationError("LBFGS updates all parameters together, and cannot do so bucket by bucket.")
            if inside is not None and not isinstance(optimizer, ZeroRedundancyOptimizer):
                raise RegistrationError(f"the {kind} that was given wraps a {type(inside).__name__}. Give that one.")
            theirs = {id(p) for group in optimizer.param_groups for p in group["params"]}
            if not theirs & trained:
                raise RegistrationError(f"the {kind} that was given updates no parameter of this model.")
            if theirs & seen:
                raise RegistrationError(f"a parameter is in two of the optimizers that were given, one a {kind}.")
            seen |= theirs

    def _conclude(self, _step: int) -> None:
        self._begun = True
        self._undo.forget()
        for watch, parameters in zip(self._watches, self._parameters, strict=True):
            watch.conclude(parameters)

    def _settle(self, happened: bool) -> None:
        if happened:
            self._undo.forget()
            return
        undone = self._undo.take_back()
        for watch in self._watches:
            watch.unclaim(undone)

    def _reduced(self, bucket: Bucket) -> Generator[Any, Any, tuple[bool, ...]]:
        """Average the gradients; return which parameters any rank has used."""
        exchange = self._inner.reduce(bucket)
        if not self._sends_flags:
            yield from exchange
            return (True,) * len(bucket.parameters)
        used = yield from reduce_with_flags(exchange, bucket)
        return used

    @property
    def _overlaps(self) -> bool:
        """Whether to step early: not in the first step, where a loss scaler or clipping shows itself unharmed."""
        return self._begun and self._is_early


def _release(watches: tuple[Watch, ...]) -> None:
    for watch in watches:
        watch.release()
