"""Hooks for training that uses no DistributedDataParallel: the gradients are averaged when the user says so."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ._bucket import Span, lay_out
from ._choosing import choose
from ._ddp import buffers_of, check_devices, trainable
from ._errors import RegistrationError
from ._protocols import is_averager
from ._register import optimizers_of
from ._registration import Registration
from ._session import Ground, Session, checked_timeout, start

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ._choosing import Chosen

BUCKET_BYTES = 25 * 2**20
"""The size at which a bucket is full, DDP's own default."""


class ManualRegistration(Registration):
    """A hook on a bare module: call ``average()`` after backward, on every rank.

    With an averager registered by itself, call it after the optimizer's step.
    """

    def __init__(self, module: nn.Module, ground: Ground, session: Session) -> None:
        self._module = module
        super().__init__(ground, session, None)
        sparse = _sparse(self._module)
        self._buckets = _fill(p for p in self._ground.parameters if id(p[1]) not in sparse)
        self._sparse = [pair for pair in self._ground.parameters if id(pair[1]) in sparse]

    def _take(self, session: Session) -> None:
        super()._take(session)
        if session.engine.timetable is not None:
            session.engine.timetable.is_late = is_averager(self.hook)

    def average(self) -> None:
        """Average the gradients of all parameters over the ranks, in place.

        A parameter without a gradient here counts as zero; one that has none on any rank is left alone. With an
        averager registered by itself, count a step and average the parameters if they are due; gradients play no part.

        Raises:
            HookError: what went wrong, on every rank.
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
        failure = engine.end() or engine.finish()
        if failure is not None:
            raise failure
        self.finish()

    def _exchange(self) -> None:
        engine = self._session.engine
        scaler = self._ground.scaler
        somewhere = self._used_somewhere()
        scale = float(scaler.get_scale()) if scaler is not None and scaler.is_enabled() else 1.0
        with torch.no_grad():
            engine.begin(loss_scale=scale)
            filled = []
            for parameters, spans in self._buckets:
                flat = torch.zeros(sum(s.numel for s in spans), dtype=parameters[0].dtype, device=self._ground.device)
                views = [flat.as_strided(s.shape, s.stride, s.offset) for s in spans]
                for view, parameter in zip(views, parameters, strict=True):
                    if parameter.grad is not None:
                        view.copy_(parameter.grad)
                used = tuple(p.grad is not None for p in parameters)
                engine.add(flat, parameters, spans, used, lambda: None)
                filled.append((parameters, views))
            for name, parameter in self._sparse:
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
            for parameters, views in filled:
                for parameter, view in zip(parameters, views, strict=True):
                    if parameter.grad is not None:
                        parameter.grad.copy_(view)
                    elif id(parameter) in somewhere:
                        parameter.grad = view.clone()
        failure = engine.finish()
        if failure is not None:
            raise failure

    def _used_somewhere(self) -> set[int]:
        parameters = [p for _, p in self._ground.parameters]
        flags = torch.tensor([float(p.grad is not None) for p in parameters], device=self._ground.device)
        counts = self._session.engine.sum(flags).tolist()
        return {id(p) for p, n in zip(parameters, counts, strict=True) if n}


def _sparse(module: nn.Module) -> set[int]:
    """The parameters whose gradients are sparse, by identity, told as DDP tells them."""
    kinds = (nn.Embedding, nn.EmbeddingBag)
    return {id(m.weight) for m in module.modules() if isinstance(m, kinds) and m.sparse}


def _fill(parameters: Iterable[tuple[str, nn.Parameter]]) -> list[tuple[list[Tensor], tuple[Span, ...]]]:
    """Buckets of one dtype each, last parameters first, as backward makes their gradients."""
    buckets: list[list[tuple[str, Tensor]]] = []
    size = 0
    for name, parameter in reversed(list(parameters)):
        fits = buckets and size + parameter.nbytes <= BUCKET_BYTES and buckets[-1][0][1].dtype == parameter.dtype
        if not fits:
            buckets.append([])
            size = 0
        buckets[-1].append((name, parameter))
        size += parameter.nbytes
    return [([p for _, p in bucket], lay_out([n for n, _ in bucket], [p for _, p in bucket])) for bucket in buckets]


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

    def chosen_here() -> Chosen:
        check_devices(module, dist.get_backend(group))
        return choose(hook, every)

    ground = Ground(
        group=group,
        device=device,
        module=weakref.ref(module),
        parameters=parameters,
        buffers=tuple(buffers_of(module)),
        unused=True,
        traits={},
        optimizers=optimizers_of(optimizer),
        scaler=scaler,
        timeout=checked_timeout(timeout, group, device),
        verify=verify,
    )
    return ManualRegistration(module, ground, start(ground, chosen_here))
