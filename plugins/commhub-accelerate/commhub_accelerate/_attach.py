"""A hook on every model that an accelerator prepares, and in every checkpoint that it writes.

Accelerate tells nobody when it has prepared something, so three methods of the accelerator are called by way of
``Attached``: ``prepare``, ``prepare_model`` and ``prepare_optimizer``. For checkpoints it has hooks of its own.
"""

from __future__ import annotations

import contextlib
import logging
from typing import TYPE_CHECKING, Any, Final

import commhub
from commhub import RegistrationError

from . import _state
from ._around import around
from ._framework import require
from ._optimizers import unwrapped
from ._refusals import checked_schedule, refuse_accelerator, refuse_options, unserved
from ._served import Served, ddp_in

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from torch.nn.parallel import DistributedDataParallel

    from commhub import Registration

KEY: Final = "_commhub_attached"
"""The accelerator's attribute with its ``Attached``."""

logger = logging.getLogger("commhub")


def attach(accelerator: Any, hook: object, *, schedule: Mapping[int, str] | None = None, **options: Any) -> Attached:
    """Register ``hook`` on every DDP model that ``accelerator`` prepares from now on; call it before ``prepare``.

    A model gets its hook at the end of the call of ``prepare`` by which every parameter that it trains is in a prepared
    optimizer; at the latest before its first forward in training. ``save_state`` and ``load_state`` carry what each
    hook remembers on every rank.

    Args:
        accelerator: an ``accelerate.Accelerator`` on which nothing was prepared yet. The keyword arguments for DDP that
            it was made with stay as they are.
        hook: a name, a hook string such as ``"powersgd(rank=4)"``, a ``HookType`` member, or a hook object.
        schedule: which hooks follow, by step, as for ``Registration.schedule``; a run that is resumed has the one due.
        options: the hook's own, and ``wire``, ``verify``, ``timeout`` and ``process_group`` of ``commhub.register``.

    Raises:
        UnknownHookError, HookConflictError, PluginError, HookOptionError: the hook cannot be had.
        PluginError: Accelerate is not installed, or of a version that is not known here.
        RegistrationError: the accelerator has prepared a model, has a hook already, or wraps no model in DDP.

    >>> attached = attach(accelerator, "powersgd_rank2")  # doctest: +SKIP
    """
    kind = require("accelerate").Accelerator
    refuse_options(options)
    commhub.checked(hook, **options)
    follow = checked_schedule(schedule)
    if not isinstance(accelerator, kind):
        raise RegistrationError(f"{type(accelerator).__name__} is no accelerate.Accelerator.")
    if KEY in vars(accelerator):
        raise RegistrationError("this accelerator has a hook already. Call detach() on what attach() returned.")
    refuse_accelerator(accelerator)
    return Attached(accelerator, hook, options, follow)


class Attached:
    """A hook attached to an accelerator. ``attach`` makes it; the registrations are made as models are prepared."""

    def __init__(self, accelerator: Any, hook: object, options: dict[str, Any], schedule: dict[int, str]) -> None:
        self._accelerator = accelerator
        self._hook, self._options, self._schedule = hook, options, schedule
        self._served: list[Served] = []
        self._depth = 0
        self._undo: list[Callable[[], None]] = [
            around(accelerator, "prepare", self._prepare),
            around(accelerator, "prepare_model", self._prepare_model),
            around(accelerator, "prepare_optimizer", self._prepare),
            accelerator.register_save_state_pre_hook(self._save).remove,
            accelerator.register_load_state_pre_hook(self._load).remove,
        ]
        setattr(accelerator, KEY, self)
        if accelerator.num_processes == 1 and self._speaks:
            logger.warning("one process: there is nothing to communicate, and %s changes nothing", self)

    def __str__(self) -> str:
        return str(self._hook) if isinstance(self._hook, str) else type(self._hook).__name__

    @property
    def models(self) -> tuple[DistributedDataParallel, ...]:
        """The DDP models that the accelerator made and that are still there, in the order of their preparation."""
        return tuple(model for served in self._served if (model := served.model) is not None)

    @property
    def registrations(self) -> tuple[Registration, ...]:
        """The registrations at work on ``models``; none in a single process, and before ``prepare``."""
        found = (served.registration for served in self._served)
        return tuple(registration for registration in found if registration is not None)

    def settle(self) -> None:
        """Register now on models that still wait for their optimizers; collective.

        Raises:
            CommhubError: whatever ``commhub.register`` raises, on every rank.
        """
        self._settle(now=True)

    def detach(self) -> None:
        """Leave the accelerator as it was made. Models that have a hook keep it: ``registration.remove()`` ends it."""
        for undo in reversed(self._undo):
            undo()
        self._undo.clear()
        vars(self._accelerator).pop(KEY, None)

    @property
    def _speaks(self) -> bool:
        return bool(self._accelerator.is_main_process)

    @contextlib.contextmanager
    def _preparing(self) -> Iterator[None]:
        """Within the outermost call nothing is registered: the optimizers may come after the model."""
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
        if not self._depth:
            self._settle()

    def _prepare(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with self._preparing():
            return method(*args, **kwargs)

    def _prepare_model(self, method: Callable[..., Any], model: Any, *args: Any, **kwargs: Any) -> Any:
        evaluation = kwargs.get("evaluation_mode", args[1] if len(args) > 1 else False)
        with self._preparing():
            prepared = method(model, *args, **kwargs)
            if ddp_in(prepared) is None:
                unserved(self._accelerator, model, prepared, evaluation=evaluation)
            elif not any(served.is_(ddp_in(prepared)) for served in self._served):
                self._served.append(Served(model, prepared, self._register))
            return prepared

    def _settle(self, *, now: bool = False) -> None:
        optimizers = unwrapped(self._accelerator._optimizers)
        self._served = [served for served in self._served if served.model is not None]
        for served in self._served:
            released = served.number(self._accelerator._models) is None
            served.wait(self._settle_late)  # first: if registering fails, no forward in training goes without
            served.settle(optimizers, now=now and not released)

    def _settle_late(self, served: Served) -> None:
        served.settle(unwrapped(self._accelerator._optimizers), now=True)

    def _register(self, model: DistributedDataParallel, optimizers: Sequence[Any]) -> Registration:
        scaler = self._accelerator.scaler
        made = commhub.register(model, self._hook, optimizer=list(optimizers) or None, scaler=scaler, **self._options)
        if self._schedule:  # before a checkpoint is taken up, whose state may be of a hook that has followed
            made.schedule(self._schedule)
        return made

    def _save(self, _models: object, _weights: object, directory: str) -> None:
        for served in self._served:
            number, registration = served.number(self._accelerator._models), served.registration
            if number is not None and registration is not None:
                registration.save(_state.folder(directory, number))

    def _load(self, _models: object, directory: str) -> None:
        self.settle()
        left = _state.folders(directory)
        for served in self._served:
            number, registration = served.number(self._accelerator._models), served.registration
            if number is not None and registration is not None:
                _state.load(registration, _state.folder(directory, number), speaks=self._speaks)
                left.discard(_state.folder(directory, number))
        if left and self._speaks and self._accelerator.num_processes > 1:
            logger.warning(
                "%s: no model was prepared that takes up the state of a hook in %s, so it is not restored. "
                "Call load_state() after prepare().",
                self,
                ", ".join(map(str, sorted(left))),
            )
