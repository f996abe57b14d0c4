"""One model that Accelerate has put in DDP, and the hook on it: from when its optimizers are known."""

from __future__ import annotations

import logging
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.parallel import DistributedDataParallel

import commhub

from ._optimizers import cover, holding

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import nn

    from commhub import Registration

logger = logging.getLogger("commhub")


def ddp_in(model: object) -> DistributedDataParallel | None:
    """The DDP model that ``model`` is or holds."""
    inside = model.modules() if isinstance(model, torch.nn.Module) else iter(())
    return next((module for module in inside if isinstance(module, DistributedDataParallel)), None)


class Served:
    """A DDP model, held weakly, that gets a hook.

    Args:
        given: what was handed to ``prepare``.
        prepared: what came back: the DDP model, or what ``torch.compile`` made of it.
        register: registers on a DDP model with the optimizers that it is given.
    """

    def __init__(self, given: nn.Module, prepared: nn.Module, register: Callable[..., Registration]) -> None:
        model = ddp_in(prepared)
        assert model is not None
        self._faces = tuple(weakref.ref(one) for one in (given, prepared, model))
        self._register = register
        self._ours: weakref.ref[Registration] | None = None
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()
        self._waiting: Any = None

    @property
    def model(self) -> DistributedDataParallel | None:
        """The DDP model, while it is there."""
        return ddp_in(self._faces[-1]())

    @property
    def registration(self) -> Registration | None:
        """The one at work."""
        model = self.model
        return None if model is None else commhub.registration(model)

    def number(self, models: Sequence[Any]) -> int | None:
        """Its place among the accelerator's models, in whichever of its forms it stands there."""
        faces = [face() for face in self._faces]
        return next((n for n, one in enumerate(models) if any(one is face for face in faces)), None)

    def is_(self, model: object) -> bool:
        """Whether ``model`` is this one, in any of its forms."""
        return model is not None and any(model is face() for face in self._faces)

    def settle(self, optimizers: Sequence[Any], *, now: bool = False) -> None:
        """Register if the optimizers that hold the model's parameters are all there, or ``now``; collective.

        Optimizers that come later are passed on by registering anew.

        Raises:
            CommhubError: whatever ``commhub.register`` raises, on every rank.
        """
        model = self.model
        if model is None:
            return
        mine = holding(optimizers, model)
        if self._ours is None and (now or cover(mine, model)):
            self._begin(model, mine)
        elif self._ours is not None and any(one not in self._known for one in mine):
            registration = self._ours()
            if registration is not None and commhub.registration(model) is registration:
                if registration.step and torch.distributed.get_rank(model.process_group) == 0:
                    logger.warning("%s: the model has another optimizer now; the hook starts afresh", registration)
                self._begin(model, mine)

    def _begin(self, model: DistributedDataParallel, optimizers: Sequence[Any]) -> None:
        self._ours = weakref.ref(self._register(model, optimizers))
        self._known = weakref.WeakSet(optimizers)
        if self._waiting is not None:
            self._waiting.remove()
            self._waiting = None

    def wait(self, then: Callable[[Served], None]) -> None:
        """Call ``then`` before the first forward in training, if no optimizers came that hold all parameters.

        Only forwards of training count, because ranks may evaluate apart.
        """
        prepared = self._faces[1]()
        if self._ours is not None or self._waiting is not None or prepared is None:
            return

        def before(module: nn.Module, _args: object) -> None:
            if module.training and torch.is_grad_enabled():
                then(self)

        self._waiting = prepared.register_forward_pre_hook(torch.compiler.disable(before))
