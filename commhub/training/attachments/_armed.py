"""The attachment to a module of ``replicate()`` until its first forward makes the DDP model, which has a slot."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

from commhub._errors import RegistrationError
from commhub.training._replicated import ddp_of, home_of, state_of

from ._coming import Coming
from ._slot import Slot
from ._uncompiled import uncompiled
from ._wrapped import wrapped

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch.nn.parallel import DistributedDataParallel

    from commhub.training._session import Session
    from commhub.training._trained import Named

ARMED = "_commhub_armed"
"""The attribute of what ``replicate()`` keeps under which this is kept."""


class Armed:
    """Waits for the DDP model, and gives the registration to that model's slot.

    Attributes:
        owner: the registration, if there is one.
        session: what will be at work.
        after: as in ``Attachment``.
    """

    def __init__(self, coming: Coming) -> None:
        self.owner: Any = None
        self.session: Session | None = None
        self.after: weakref.WeakMethod[Callable[[], None]] | None = None
        self._state, self._module = weakref.ref(coming.state), weakref.ref(coming.module)
        # It comes after the hook of replicate() itself, which makes the model.
        self._handle = coming.module.register_forward_pre_hook(_Opening(self))
        setattr(coming.state, ARMED, self)

    def parameters(self) -> tuple[Named, ...]:
        """Those that the DDP model will average, if nothing changes; once it is made, those that it averages."""
        state, module = self._state(), self._module()
        assert state is not None
        assert module is not None
        made = ddp_of(state)
        return Coming(module, state).parameters if made is None else wrapped(made)

    def attach(self, session: Session, owner: object) -> None:
        """Have this session fed from the first backward on."""
        self.owner, self.session = owner, session

    def detach(self) -> bool:
        """Wait no more; the DDP model will have no slot."""
        self._end()
        self.owner = self.after = None
        return False

    def _end(self) -> None:
        self._handle.remove()
        state = self._state()
        if state is not None and vars(state).get(ARMED) is self:
            delattr(state, ARMED)

    def open(self) -> None:
        """The DDP model is made: have its slot feed the session.

        Raises:
            RegistrationError: if it averages other parameters than those that the hook was prepared for.
        """
        state = self._state()
        made = None if state is None else ddp_of(state)
        if made is None or self.session is None:
            return
        reduced, prepared = wrapped(made), self.session.target.parameters
        if [(name, id(p)) for name, p in reduced] != [(name, id(p)) for name, p in prepared]:
            both = {*((name, id(p)) for name, p in reduced)} ^ {*((name, id(p)) for name, p in prepared)}
            names = ", ".join(sorted({repr(name) for name, _ in both})[:6])
            raise RegistrationError(
                f"{self.owner}: {names or 'parameters'} changed between registration and the first forward: frozen, "
                "unfrozen, replaced or added. Call swap() with the hook, or register again, on all ranks."
            )
        owner = self.owner
        self._end()
        owner._move(Slot.install(made, reduced))
        self.owner = None


class _Opening:
    """The forward pre-hook; it keeps the attachment not alive, and copies of a module go without it."""

    def __init__(self, armed: Armed) -> None:
        self._armed = weakref.ref(armed)

    def __call__(self, *_: object) -> None:
        armed = self._armed()
        if armed is not None:
            uncompiled(armed.open)()

    def __reduce__(self) -> tuple[Any, ...]:
        return (_nothing, ())


def _nothing() -> Callable[..., None]:
    return _pass


def _pass(*_: object) -> None:
    """Do nothing."""


def fed_by(model: DistributedDataParallel | Coming) -> Slot | Armed | None:
    """What a registration on the model is attached to, if there is one."""
    if isinstance(model, Coming):
        return _armed(model.state)
    slot = Slot.on(model)
    if slot is not None:
        return slot
    home = home_of(model)
    return None if home is model else _armed(state_of(home))


def _armed(state: Any) -> Armed | None:
    armed: Armed | None = vars(state).get(ARMED)
    return armed


def attach_to(model: DistributedDataParallel | Coming, parameters: Sequence[Named]) -> Slot | Armed:
    """The model's slot, made where there was none, or what waits for it."""
    former = fed_by(model)
    if isinstance(former, Armed):
        if isinstance(model, Coming):
            return former
        former.detach()
    return Armed(model) if isinstance(model, Coming) else Slot.install(model, parameters)
