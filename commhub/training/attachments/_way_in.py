"""DDP models whose reducer calls a function that passes its buckets on to a slot, so that they need no other.

While such a function has a hook registered it may raise on one rank alone, before the ranks compare anything or after.
So they meet in the model's own group before the first registration, and again when the function is done.
"""

from __future__ import annotations

import contextlib
import weakref
from typing import TYPE_CHECKING, Any

import attrs
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from commhub._errors import RegistrationError
from commhub.training._target import group_timeout, usable_timeout
from commhub.training.rendezvous._agree import Rendezvous, agree

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Sequence

    from torch import Tensor
    from torch.distributed import ProcessGroup

PASSES_ON = "_commhub_passes_on"
"""The attribute of such a function."""
_CALL = "register_comm_hook"
"""What ranks say that they have come to."""
_REFUSED = 2.0
"""Seconds that a rank waits for its peers where it does not know its model."""

_passing_on: weakref.WeakKeyDictionary[DistributedDataParallel, Passing] = weakref.WeakKeyDictionary()
"""By model, while one is passing on."""


def has_way_in(model: DistributedDataParallel) -> bool:
    """Whether what the user gave to ``register_comm_hook`` passes its buckets on, or does so now."""
    return model in _passing_on or any(hasattr(function, PASSES_ON) for function, _ in model._comm_hooks)


def known_parameters(model: DistributedDataParallel) -> Sequence[Tensor]:
    """Those that the reducer holds, where it cannot be asked because it is waiting for what it has called."""
    passing = _passing_on.get(model)
    return () if passing is None else passing.known


def is_passing_on() -> bool:
    """Whether a function is having a hook registered: then what goes wrong on this rank is told when it is done."""
    return bool(_passing_on)


def come(model: object, timeout: float | None) -> None:
    """Where such a function is about to register on the model, wait for the other ranks; ``timeout`` is the user's.

    Raises:
        RegistrationError: if another rank cannot go on, or does not come.
    """
    if isinstance(model, DistributedDataParallel) and (passing := _passing_on.get(model)) is not None:
        passing.come(usable_timeout(timeout, model.process_group, model.device))


@contextlib.contextmanager
def passing_on(model: DistributedDataParallel, parameters: Sequence[Tensor] = ()) -> Iterator[None]:
    """Within it the model has a way in, and its reducer, if ``parameters`` are given, is known to hold these.

    Collective: what the block raises here is raised here, and a RegistrationError on the other ranks.
    """
    passing = _passing_on[model] = Passing(model.process_group, group_timeout(model.process_group, model.device))
    passing.known = parameters
    try:
        try:
            yield
        except BaseException as error:  # noqa: BLE001 - it is raised again, after the peers were told
            passing.end(error)
        else:
            passing.end(None)
    finally:
        del _passing_on[model]


def refuse(error: RegistrationError, groups: Collection[ProcessGroup]) -> None:
    """Have the other ranks know that this one does not come, because of ``error``, which may get a note.

    Args:
        error: why this rank cannot go on.
        groups: those that the model may have; where they are none or several, all ranks' is tried, for a short time.
    """
    group = next(iter(groups)) if len(groups) == 1 else dist.group.WORLD
    with contextlib.suppress(RegistrationError):  # the error itself, too
        assert group is not None
        seconds = group_timeout(group, torch.device("cpu")) if len(groups) == 1 else _REFUSED
        agree(Rendezvous.of(group, seconds), _CALL, {}, error)


@attrs.define(eq=False)
class Passing:
    """The ranks' meeting while a function has a hook registered: twice, if all get as far as registering.

    Attributes:
        known: the reducer's parameters, where it cannot be asked.
    """

    known: Sequence[Tensor] = attrs.field(init=False, default=())
    _group: ProcessGroup
    _timeout: float
    _rendezvous: Rendezvous | None = attrs.field(init=False, default=None)
    _kept: Any = attrs.field(init=False, default=None)  # the part of the store that is not tidied away
    _failure: BaseException | None = attrs.field(init=False, default=None)

    def come(self, timeout: float, failure: BaseException | None = None) -> None:
        """Meet for the first time, unless that was before.

        Raises:
            RegistrationError: if that failed, for another rank's failure; also whenever this is called again.
            BaseException: ``failure`` itself.
        """
        if self._failure is not None:
            raise self._failure
        if self._rendezvous is not None:
            return
        try:
            self._rendezvous = Rendezvous.of(self._group, timeout)
            agree(self._rendezvous, _CALL, {}, failure, more=True)
        except RegistrationError as error:
            self._failure = error
            if failure is None:
                raise
            raise failure from failure.__cause__
        except BaseException as error:
            self._failure = error
            raise
        self._kept = self._rendezvous.branch(_CALL)

    def end(self, failure: BaseException | None) -> None:
        """Meet for the last time.

        Raises:
            RegistrationError: if another rank failed.
            BaseException: ``failure`` itself.
        """
        if self._failure is not None:
            raise failure or self._failure
        if self._rendezvous is None:
            self.come(self._timeout, failure)
        else:
            agree(self._rendezvous, _CALL, {}, failure)
