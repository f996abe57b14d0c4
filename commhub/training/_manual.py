"""Hooks for training that uses no DistributedDataParallel: the gradients are averaged when the user says so."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import attrs
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from commhub._errors import RegistrationError
from commhub.protocol._bucket import lay_out
from commhub.protocol._hook import is_averager
from commhub.registry._recipe import choose

from ._ddp import check_devices
from ._late import Late, pack, sparse_in
from ._register import optimizers_of
from ._registration import Registration
from ._start import Session, start
from ._target import Target, checked_timeout
from ._trained import Trained, trainable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from commhub.registry._recipe import Recipe

BUCKET_BYTES = 25 * 2**20
"""The size at which a bucket is full, DDP's own default."""


class ManualRegistration(Registration):
    """A hook on a bare module: call ``average()`` after backward, on every rank.

    With an averager registered by itself, call it after the optimizer's step.
    """

    def __init__(self, module: nn.Module, target: Target, session: Session) -> None:
        self._module = module
        self._trained = Trained(weakref.ref(module))
        super().__init__(target, session, None)
        self._pack()

    def _pack(self) -> None:
        """Lay the gradients out that the hook was prepared for."""
        sparse, parameters = sparse_in(self._module), self._target.parameters
        self._buckets = pack([(name, p) for name, p in parameters if id(p) not in sparse])
        self._sparse = [(name, p) for name, p in parameters if id(p) in sparse]
        self._late = Late(self._trained, self._module, parameters)

    def _replace(self, choose_one: Callable[[], Recipe], call: str = "swap") -> None:
        former = self._target
        self._target = attrs.evolve(former, parameters=self._trained.look())
        try:
            super()._replace(choose_one, call)
        except BaseException:
            self._target = former
            raise
        self._pack()

    def _attach(self, session: Session) -> None:
        super()._attach(session)
        if session.engine.timetable is not None:
            session.engine.timetable.is_late = is_averager(self.hook)

    def average(self) -> None:
        """Average the gradients of all parameters over the ranks, in place.

        A parameter without a gradient here counts as zero; one that has none on any rank is left alone. One that is
        trained only since the hook was registered or swapped is averaged by a plain mean, and a warning says so once.

        With an averager registered by itself, count a step and average the parameters if they are due; gradients play
        no part.

        Raises:
            HookError: what went wrong, on every rank; also where ranks do not train the same parameters.
        """
        self._check_usable()
        if is_averager(self.hook):
            self._count()
        else:
            self._exchange()
        if self._schedule:
            self._follow_schedule()

    def _count(self) -> None:
        engine = self._session.engine
        engine.begin()
        failure = engine.end() or engine.after_step()
        if failure is not None:
            raise failure
        self.finish()

    def _exchange(self) -> None:
        engine, device, late = self._session.engine, self._target.device, self._late
        scaler = self._target.scaler
        somewhere = self._used_somewhere()
        scale = float(scaler.get_scale()) if scaler is not None and scaler.is_enabled() else 1.0
        with torch.no_grad():
            engine.begin(loss_scale=scale)
            filled: list[tuple[Tensor, Tensor]] = []
            for packed, plain in [*((p, False) for p in self._buckets), *((p, True) for p in late.buckets)]:
                flat, views = packed.empty(device)
                fit = [plain or late.knows(parameter) for parameter in packed.parameters]
                pairs = [(p, v) for p, v, fits in zip(packed.parameters, views, fit, strict=True) if fits]
                for parameter, view in pairs:
                    if parameter.grad is not None:
                        view.copy_(parameter.grad)
                used = tuple(fits and p.grad is not None for p, fits in zip(packed.parameters, fit, strict=True))
                engine.add(flat, packed.parameters, packed.spans, used, lambda: None, plain=plain)
                filled += pairs
            for name, parameter in [*self._sparse, *late.sparse]:
                if parameter.grad is None and id(parameter) in somewhere:
                    parameter.grad = torch.sparse_coo_tensor(
                        torch.empty((1, 0), dtype=torch.int64),
                        parameter.new_empty((0, *parameter.shape[1:])),
                        parameter.shape,
                        device=parameter.device,
                    )
                if parameter.grad is not None:
                    spans = lay_out([name], [parameter])
                    engine.add(parameter.grad, [parameter], spans, (True,), lambda: None)
            failure = engine.end()
            if failure is not None:
                raise failure
            for parameter, view in filled:
                if parameter.grad is not None:
                    parameter.grad.copy_(view)
                elif id(parameter) in somewhere:
                    parameter.grad = view.clone()
        failure = engine.after_step()
        if failure is not None:
            raise failure

    def _used_somewhere(self) -> set[int]:
        """The parameters that have a gradient on some rank. What ranks train is compared here where it has changed.

        Raises:
            HookError: if the ranks differ in it.
        """
        engine, prepared = self._session.engine, [p for _, p in self._target.parameters]
        while True:
            late, changed = self._late.look()
            flags = [p is not None and p.grad is not None for p in (*prepared, *late)]
            told = torch.tensor([*flags, changed], dtype=torch.float32, device=self._target.device)
            counts = engine.sum(told).tolist()
            if not counts[-1]:
                break
            failure = self._late.agree(engine, self._target.device)
            if failure is not None:
                raise failure
        self._late.pack()
        return {id(p) for p, count in zip((*prepared, *late), counts[:-1], strict=True) if count}


def manual(
    module: nn.Module,
    hook: object,
    *,
    process_group: dist.ProcessGroup | None = None,
    optimizer: torch.optim.Optimizer | Iterable[torch.optim.Optimizer] | None = None,
    scaler: Any = None,
    wire: torch.dtype | str | None = None,
    verify: bool = True,
    timeout: float | None = None,
    **options: Any,
) -> ManualRegistration:
    """Average the gradients of a bare module with a hook, or its parameters with an averager; collective.

    The arguments are those of ``commhub.register``; ``process_group`` is all ranks by default. Call ``average()`` on
    what is returned: after each backward, or with an averager after each step of the optimizer.

    Raises:
        RegistrationError: also if ``module`` is a DDP model, which averages by itself, or there is no process group.

    >>> registration = commhub.manual(module, "fp16")  # doctest: +SKIP
    >>> loss.backward(); registration.average(); optimizer.step()  # doctest: +SKIP
    """
    if isinstance(module, DistributedDataParallel):
        raise RegistrationError("a DistributedDataParallel model averages by itself. Use commhub.register.")
    parameters = tuple(trainable(module))
    if not parameters:
        raise RegistrationError("the module has no trainable parameters.")
    if not dist.is_initialized():
        raise RegistrationError("there is no process group. Call torch.distributed.init_process_group first.")
    group = dist.group.WORLD if process_group is None else process_group
    if group is None or dist.get_rank(group) < 0:
        raise RegistrationError("this process is not in the process group that was given.")
    device = parameters[0][1].device
    every = dict(options)
    if wire is not None:
        every["wire"] = wire

    def chosen_here() -> Recipe:
        check_devices((p for _, p in parameters), dist.get_backend(group))
        return choose(hook, every)

    target = Target(
        group=group,
        device=device,
        module=weakref.ref(module),
        parameters=parameters,
        unused=True,
        traits={},
        optimizers=optimizers_of(optimizer),
        scaler=scaler,
        timeout=checked_timeout(timeout, group, device),
        verify=verify,
    )
    return ManualRegistration(module, target, start(target, chosen_here))
