"""The hook that runs for a registration, and how another takes its place."""

from __future__ import annotations

import logging
import weakref
from typing import TYPE_CHECKING

import attrs

from commhub._errors import RegistrationError

from ._observing import end, end_all, observe
from ._reporting import Reports
from ._reunion import Reunion
from ._start import refuse_removed, start

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

    from commhub.drivers._observers import Observer
    from commhub.registry._recipe import Recipe
    from commhub.training.attachments._attachment import Attachment

    from ._reporting import Report
    from ._session import Session

logger = logging.getLogger("commhub")


class Running:
    """Which session works on a model, from what feeds it.

    Args:
        session: the first.
        attachment: what feeds it.
        owner: the registration. Whoever holds it holds this.
        follow: called after what a timetable of the session's waits for.
        after_step: called after each step, once somebody wants that.

    Attributes:
        session, attachment: at work now.
        is_removed: whether another registration, or none, has the model now.
    """

    def __init__(
        self,
        session: Session,
        attachment: Attachment,
        owner: object,
        follow: weakref.WeakMethod[Callable[[], None]],
        after_step: weakref.WeakMethod[Callable[[], None]],
    ) -> None:
        self.session, self.attachment, self.is_removed = session, attachment, False
        self._reunion: Reunion | None = None
        self._owner, self._follow, self._after_step = weakref.ref(owner), follow, after_step
        self._reports = Reports()

    def begin(self) -> None:
        """Have the first session fed, once the owner can be asked what it is."""
        self.attachment.after = None
        self._attach()
        self.announce("registered")

    def check_usable(self) -> None:
        """Raise RegistrationError where nothing can be changed; forget a step that backward left over."""
        self.check_registered()
        self.forget_left_over()
        if self.session.engine.in_step:
            raise RegistrationError("a step is under way; swap, schedule and remove between steps.")

    def forget_left_over(self) -> None:
        """Forget a step that backward left over."""
        engine = self.session.engine
        if engine.is_left_over:
            engine.abandon()
            engine.settle()

    def check_registered(self, call: str = "") -> None:
        """Raise RegistrationError where another registration, or none, has the model.

        ``call``: what the user called, if it takes all ranks. Those who wait for this one hear of it.
        """
        if self.is_removed:
            error = RegistrationError("this registration was removed. Call commhub.register again.")
            if call:
                refuse_removed(error, call, self.session.target)
            raise error

    def start(self, choose: Callable[[], Recipe], call: str, *, loading: bool = False) -> Session:
        """Another hook, ready to take over; collective. Until ``install`` it changes nothing."""
        former = self.session
        target = former.target
        if not loading:  # a checkpoint is of what the former hook was prepared for
            target = attrs.evolve(target, parameters=self.attachment.parameters())
        session = start(target, choose, former, call=call, loading=loading)
        self._reunion = Reunion.of(session, former)
        session.engine.step = self._reunion.step
        return session

    def replace(self, choose: Callable[[], Recipe], call: str = "swap") -> None:
        """Put another hook in its place; collective."""
        self.check_registered(call)
        self.forget_left_over()

        def between_steps() -> Recipe:  # a rank that is in a step says so to the others
            self.check_usable()
            return choose()

        self.install(self.start(between_steps, call))

    def install(self, session: Session, *, loading: bool = False) -> None:
        """Have it take over."""
        former, reunion, self._reunion = self.session, self._reunion, None
        assert reunion is not None
        session.take_over(former)
        if not loading:  # then the parameters are, or will be, those of the checkpoint
            reunion.part()
        self.session = session
        self._attach()
        former.stop()
        if not loading:
            reunion.end()

    def move(self, attachment: Attachment) -> None:
        """Have another attachment feed the session, with what waits for its steps."""
        attachment.after, self.attachment = self.attachment.after, attachment
        self._attach()

    def end(self) -> None:
        """Leave the model to what was installed last, if it still needs that."""
        self.is_removed = True
        self._end_watching()
        if not self.attachment.detach():
            self.session.stop()

    def retire(self, session: Session) -> None:
        """Another registration has taken the model over with ``session``; collective."""
        self.is_removed = True
        self._end_watching()
        relieve(self.session, session)

    def withdraw(self) -> None:
        """End as if nothing had been registered; each rank by itself."""
        self.is_removed = True
        self._end_watching()
        self.session.stop()

    def observe(self, observer: Observer) -> Callable[[], None]:
        """Tell ``observer`` of all exchanges from now on, whichever hook runs; what ends that.

        Raises:
            RegistrationError: if the model is gone.
        """
        return observe(self._module(), self.session.engine.observers, observer)

    def add_report(self, report: Report) -> Callable[[], None]:
        """Have figures reported from now on, whichever hook runs; what ends that.

        Raises:
            RegistrationError: if the model is gone.
        """
        undo = observe(self._module(), self._reports, report)
        self.call_after_steps()
        return undo

    def call_after_steps(self) -> None:
        """Have the owner called after each step."""
        self.attachment.after = self._after_step

    def report(self) -> None:
        """A step has ended: tell those whose interval is over."""
        session = self.session
        for report in self._reports.everyone():
            report.step_ended(session.engine.stats, session.engine.step, str(session))
            if report.is_over:
                end(session.target.module(), self._reports, report)

    def _module(self) -> nn.Module:
        module = self.session.target.module()
        if module is None:
            raise RegistrationError("the model that this registration belongs to is gone.")
        return module

    def _end_watching(self) -> None:
        module = self.session.target.module()
        end_all(module, self.session.engine.observers)
        end_all(module, self._reports)

    def announce(self, verb: str) -> None:
        """Log what happened, on rank 0."""
        session, engine = self.session, self.session.engine
        if engine.rank == 0:
            logger.info("%s %s on %d ranks at step %d", verb, session, engine.world_size, engine.step)
            if verb == "registered" and session.timetable is not None:
                session.timetable.advise(str(session))

    def _attach(self) -> None:
        self.session.close_with(self.attachment)
        if self.session.timetable is not None:
            self.session.timetable.then = self._follow
        self.attachment.attach(self.session, self._owner())


def relieve(former: Session, session: Session) -> None:
    """End a session whose model another registration's works on now; collective."""
    reunion = Reunion.of(session, former)
    reunion.part()
    former.stop()
    reunion.end()
