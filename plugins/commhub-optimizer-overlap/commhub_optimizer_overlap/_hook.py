"""The optimizer's step, bucket by bucket."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

import attrs
import torch
from torch.distributed.optim import ZeroRedundancyOptimizer

from commhub import RegistrationError

from ._masters import Loading, Masters, narrow, widen
from ._overlap import Overlap
from ._standin import Members, Update, step_some

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from commhub import Bucket, Exchange, Setup

    from ._watch import Watch

_DTYPES = {None: None, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@attrs.define(eq=False, kw_only=True, slots=False)
class OptimizerOverlap(Overlap):
    """Average gradients with another hook, and step each bucket's parameters as soon as they are averaged.

    The user's ``optimizer.step()`` stays and does what is left. Parameters end up as they would without overlap. With
    ``step="auto"`` nobody has to call it: when backward has ended, what is left is stepped, and gradients are set to
    ``None``.

    For 16-bit parameters, ``master=True`` keeps them in float32 as well, steps those with state in float32, and
    rounds (Micikevicius et al. 2018, arXiv 1710.03740, section 3.1). ``reduce_dtype`` is what gradients are cast to
    for the inner hook; a master is stepped with what the hook makes of them, in float32.
    """

    master: bool = False
    reduce_dtype: str | None = attrs.field(default=None, validator=attrs.validators.in_(_DTYPES))
    step: str = attrs.field(default="user", validator=attrs.validators.in_(("user", "auto")))
    _optimizers: tuple[torch.optim.Optimizer, ...] = attrs.field(init=False, repr=False, default=())
    _members: Members | None = attrs.field(init=False, repr=False, default=None)
    _masters: Masters | None = attrs.field(init=False, repr=False, default=None)
    _first: dict[int, Tensor] = attrs.field(init=False, repr=False, factory=dict)

    def prepare(self, setup: Setup) -> None:
        """Prepare the inner hook and watch the optimizers.

        Raises:
            RegistrationError: if an optimizer cannot be stepped bucket by bucket, or is not this model's.
        """
        super().prepare(setup)
        self._optimizers = setup.optimizers
        if self.step == "auto" and setup.parameters:
            setup.after_step(self._end_step)
        self._members = Members(setup.optimizers)
        if self.master and setup.parameters:
            self._masters = Masters(setup)
            for optimizer, watch in zip(setup.optimizers, self._watches, strict=True):
                self._serve_masters(setup, optimizer, watch)

    def _prepare_inner(self, setup: Setup) -> None:
        dtype = _DTYPES[self.reduce_dtype]
        if dtype is not None:
            setup = attrs.evolve(setup, dtypes=tuple(dtype if d.is_floating_point else d for d in setup.dtypes))
        super()._prepare_inner(setup)

    def _serve_masters(self, setup: Setup, optimizer: torch.optim.Optimizer, watch: Watch) -> None:
        assert self._masters is not None
        masters = self._masters
        loading = Loading(optimizer, masters)
        finish = weakref.WeakMethod(self._step_what_is_left)
        watch.finishers.append(finish)
        reference = weakref.ref(optimizer)

        def end() -> None:
            loading.end()
            watch.finishers.remove(finish)
            kept = reference()
            if kept is not None and not watch.finishers:
                for parameter in (p for group in kept.param_groups for p in group["params"] if p in masters):
                    narrow(kept, parameter)

        finalizer = weakref.finalize(self, end)
        finalizer.atexit = False
        setup.at_end(finalizer)

    def _check(self, setup: Setup) -> None:
        super()._check(setup)
        if any(isinstance(optimizer, ZeroRedundancyOptimizer) for optimizer in setup.optimizers):
            raise RegistrationError("ZeroRedundancyOptimizer also sends parameters. Register 'zero_overlap' for it.")
        if self.step == "auto" and setup.scaler is not None and setup.scaler.is_enabled():
            raise RegistrationError("a loss scaler decides whether to step. Leave out step='auto' and call its step().")

    def _needs_watches(self) -> bool:
        return self.master

    def reduce(self, bucket: Bucket) -> Exchange:
        """Average with the inner hook, then step the parameters that some rank has used."""
        dtype = _DTYPES[self.reduce_dtype]
        is_cast = dtype not in (None, bucket.flat.dtype) and bucket.flat.is_floating_point()
        wide: Bucket = bucket.to(dtype) if is_cast and dtype is not None else bucket
        used = yield from self._reduced(wide)
        if wide is not bucket:
            bucket.flat.copy_(wide.flat)
        if self._watches:
            self._step(bucket, wide.gradients, used)

    def _end_step(self, _step: int) -> None:
        for optimizer in self._optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def _step(self, bucket: Bucket, exact: Sequence[Tensor], used: Sequence[bool]) -> None:
        assert self._members is not None
        places = self._members()
        updates: list[list[Update]] = [[] for _ in self._optimizers]
        left: list[list[Tensor]] = [[] for _ in self._optimizers]
        for parameter, gradient, wide, is_used in zip(bucket.parameters, bucket.gradients, exact, used, strict=True):
            place = places.get(id(parameter))
            if place is None:
                continue  # no optimizer's, or that of one that is not overlapped
            if is_used and self._overlaps:
                updates[place[0]].append(self._update(place, parameter, gradient, wide))
            else:
                left[place[0]].append(parameter)
                self._keep(parameter, wide, is_used)
        for optimizer, watch, some, others in zip(self._optimizers, self._watches, updates, left, strict=True):
            watch.claim([(u.parameter, u.group) for u in some], others, took_part=any(bucket.used))
            if self.undo:
                self._undo.note(bucket.step, optimizer, [(u.parameter, u.master) for u in some])
            self._carry_out(optimizer, some)

    def _update(self, place: tuple[int, int], parameter: Tensor, gradient: Tensor, wide: Tensor) -> Update:
        master = None if self._masters is None else self._masters.of(parameter)
        if master is None:
            return Update(place[1], parameter, gradient)
        widen(self._optimizers[place[0]], parameter)
        return Update(place[1], parameter, wide.to(master.dtype), master)

    def _carry_out(self, optimizer: torch.optim.Optimizer, updates: Sequence[Update]) -> None:
        step_some(optimizer, updates)
        for update in updates:
            if update.master is not None and self._masters is not None:
                self._masters.write(update.parameter)

    def _keep(self, parameter: Tensor, wide: Tensor, is_used: bool) -> None:
        """In the first step: what a master is to be stepped with is not in ``.grad``, which is rounded."""
        self._first.pop(id(parameter), None)
        if is_used and self._is_early and self._masters is not None and parameter in self._masters:
            self._first[id(parameter)] = wide

    def _step_what_is_left(self, optimizer: torch.optim.Optimizer, stepped: frozenset[int]) -> list[Tensor]:
        """Step the masters of parameters that have gradients and were not stepped in backward; return those."""
        assert self._members is not None
        assert self._masters is not None
        places, first, self._first = self._members(), self._first, {}
        updates = []
        for parameter in (p for group in optimizer.param_groups for p in group["params"]):
            place = places.get(id(parameter))
            if place is None or parameter.grad is None or id(parameter) in stepped or parameter not in self._masters:
                continue
            wide = first.get(id(parameter), parameter.grad)
            updates.append(self._update(place, parameter, parameter.grad, wide))
        with torch.no_grad():
            self._carry_out(optimizer, updates)
        return [update.parameter for update in updates]
