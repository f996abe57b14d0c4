"""Hooks for training that uses no DistributedDataParallel: the gradients are averaged when the user says so."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch import nn

from commhub._errors import CommhubError, RegistrationError
from commhub._printable import shown
from commhub.protocol._hook import is_averager
from commhub.registry._recipe import choose
from commhub.training.attachments._collector import Collector
from commhub.training.attachments._ddp import check_devices, group_in, group_of, inside
from commhub.training.attachments._unserved import refuse_bare, refuse_owners

from ._given import check_scaler, optimizers_of
from ._registration import Registration
from ._start import refuse, start
from ._target import Target, checked_timeout, usable_timeout
from ._trained import trainable

if TYPE_CHECKING:
    from collections.abc import Iterable

    import torch
    from torch.distributed.device_mesh import DeviceMesh

    from commhub.registry._recipe import Recipe

    from ._session import Session
    from ._trained import Named


class ManualRegistration(Registration):
    """A hook on a bare module: call ``average()`` after backward, on every rank.

    With an averager registered by itself, call it after the optimizer's step.
    """

    def __init__(self, session: Session, collector: Collector) -> None:
        self._collector = collector
        super().__init__(session, collector)

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
            self._collector.count(self.finish)
        else:
            self._collector.reduce()


def manual(
    module: nn.Module,
    hook: object,
    *,
    process_group: dist.ProcessGroup | DeviceMesh | None = None,
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
    try:
        parameters = _parameters(module)
        group = group_of(None, process_group)
    except CommhubError as error:
        refuse(error, "register", group_in(process_group))
        raise
    device = parameters[0][1].device
    every = dict(options)
    if wire is not None:
        every["wire"] = wire

    def chosen_here() -> Recipe:
        if not isinstance(verify, bool):
            raise RegistrationError(f"verify is {shown(verify)}; it is True or False.")
        check_devices((p for _, p in parameters), dist.get_backend(group))
        checked_timeout(timeout, group, device)
        optimizers_of(optimizer)
        check_scaler(scaler)
        return choose(hook, every)

    target = Target(
        group=group,
        device=device,
        module=weakref.ref(module),
        parameters=parameters,
        unused=True,
        traits={},
        after_optimizers=True,
        optimizers=optimizers_of(optimizer, strict=False),
        scaler=scaler,
        timeout=usable_timeout(timeout, group, device),
        verify=verify is not False,
    )
    return ManualRegistration(start(target, chosen_here), Collector(module))


def _parameters(module: object) -> tuple[Named, ...]:
    """Those that are trained.

    Raises:
        RegistrationError: if there are none, or the module is none or averages by itself.
    """
    if not isinstance(module, nn.Module):
        raise RegistrationError(f"module is {shown(module)}; give a torch.nn.Module.")
    refuse_owners(module)
    averaged = inside(module)
    if averaged:
        raise RegistrationError(
            f"{type(module).__name__} is or holds a model of DistributedDataParallel or replicate(), which averages by "
            "itself. Use commhub.register."
        )
    refuse_bare(module)
    parameters = tuple(trainable(module))
    if not parameters:
        raise RegistrationError("the module has no trainable parameters.")
    return parameters
