"""A hook at work on a target; an object of a user's works in one place at a time."""

from __future__ import annotations

import contextlib
import threading
import weakref
from typing import TYPE_CHECKING

import attrs

from commhub._errors import RegistrationError
from commhub.protocol._nesting import LocalSteps

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

    from commhub.drivers._driver import Driver
    from commhub.drivers._network import Network
    from commhub.protocol._hook import Averager, Hook
    from commhub.registry._recipe import Recipe
    from commhub.training.averaging._timetable import Timetable
    from commhub.training.steps._engine import Engine

    from ._target import Target

_at_work: weakref.WeakValueDictionary[int, Engine] = weakref.WeakValueDictionary()
"""By the hook's identity: an object's memory belongs to one model."""
_starting: set[int] = set()
"""Those that some thread is about to put to work."""
_taking = threading.Lock()


@attrs.define(eq=False)
class Session:
    """A hook at work; ``str()`` is the hook string.

    Attributes:
        target: what it works on.
        chosen: which hook.
        engine: its steps, its memory and its figures.
        driver: what carries its exchanges out.
        timetable: its averages of the parameters, if it brought an averager.
        network: what is emulated.
    """

    target: Target
    chosen: Recipe
    engine: Engine
    driver: Driver
    timetable: Timetable | None = None
    network: Network | None = None
    _closing: weakref.finalize[..., object] | None = attrs.field(init=False, default=None)

    def __attrs_post_init__(self) -> None:
        _at_work[id(at_work(self.engine.hook))] = self.engine

    def __str__(self) -> str:
        return str(self.chosen)

    @property
    def wire(self) -> torch.dtype | None:
        """The registration's wire dtype."""
        return self.engine.wire

    @property
    def hook(self) -> Hook | Averager:
        """The object that the user chose."""
        return at_work(self.engine.hook)

    def emulate(self, network: Network | None) -> None:
        """Make collectives as slow as on ``network``, from the next step on."""
        self.network = self.driver.network = network

    def in_use(self) -> str:
        """Why memory of its buckets may still be written to, for people; empty if it is not."""
        return self.driver.in_use()

    def take_over(self, former: Session) -> None:
        """Go on with what outlives a hook: its figures, who observes, the network that is emulated."""
        self.engine.take_over(former.engine)
        self.emulate(former.network)

    def close_with(self, attachment: object) -> None:
        """Free the thread and the groups when nothing holds the attachment any more."""
        if self._closing is not None:
            self._closing.detach()
        self._closing = weakref.finalize(attachment, self.driver.close, "has let go of its model")
        self._closing.atexit = False  # every driver is closed then, and says that this rank has exited

    def stop(self, leaving: str = "") -> None:
        """End the hook's work: its thread and groups are freed, and the object may be registered again.

        Args:
            leaving: what to tell peers that go on with it, a predicate; empty where all ranks end it.
        """
        if self._closing is not None:
            self._closing.detach()  # it would keep this hook's groups and connections open
        worker = id(self.hook)
        if _at_work.get(worker) is self.engine:
            del _at_work[worker]
        if self.timetable is not None:
            self.timetable.close()
        self.engine.callbacks.end()
        self.driver.close(leaving)


def at_work(hook: Hook) -> Hook | Averager:
    """The object that the user chose: the hook, or the averager that was registered by itself."""
    return hook.averager if isinstance(hook, LocalSteps) else hook


@contextlib.contextmanager
def taken(hook: Hook, name: str, former: Session | None) -> Iterator[None]:
    """Keep other threads from putting the hook to work until the block is over.

    Raises:
        RegistrationError: if it is at work elsewhere than in ``former``.
    """
    worker = at_work(hook)
    with _taking:
        other = _at_work.get(id(worker))
        here = former is not None and other is former.engine
        elsewhere = other is not None and not here and at_work(other.hook) is worker
        if elsewhere or id(worker) in _starting:
            raise RegistrationError(f"this {name} object is at work already. Give each model a hook of its own.")
        _starting.add(id(worker))
    try:
        yield
    finally:
        _starting.discard(id(worker))
