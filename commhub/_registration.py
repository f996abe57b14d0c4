"""A registered hook: what the user holds to read figures, save, swap and remove it."""

from __future__ import annotations

import contextlib
import logging
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from . import _saving
from ._agree import Meeting, agree
from ._choosing import Chosen, choose
from ._engine import PlainMean
from ._errors import RegistrationError
from ._session import Ground, Session, at_work, latest, start, stop

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from ._network import Network
    from ._protocols import Averager, Hook
    from ._slot import Slot
    from .drivers._stats import Stats

logger = logging.getLogger("commhub")


class Registration:
    """One hook registered on one model. ``commhub.register`` makes it; ``str()`` is the hook string it runs.

    ``swap``, ``schedule``, ``remove``, ``save`` and ``load`` are collective: every rank calls them, between steps.
    """

    def __init__(self, ground: Ground, session: Session, slot: Slot | None) -> None:
        self._ground, self._session, self._slot, self._removed = ground, session, slot, False
        self._schedule: dict[int, str] = {}
        self._network: Network | None = None
        self._closing: Any = weakref.finalize(self, bool)
        self._take(session)
        self._announce("registered")

    def __str__(self) -> str:
        return self._session.chosen.text(self._session.wire)

    def __repr__(self) -> str:
        return f"<commhub registration of {self} at step {self.step}>"

    @property
    def hook(self) -> Hook | Averager:
        """The hook object at work; the averager, where one was registered by itself."""
        return at_work(self._session.engine.hook)

    @property
    def name(self) -> str:
        """The hook's name."""
        return self._session.chosen.name

    @property
    def options(self) -> Mapping[str, object]:
        """All options of the hook, defaults and presets included."""
        return dict(self._session.chosen.options)

    @property
    def step(self) -> int:
        """Synchronised backward passes so far."""
        return self._session.engine.step

    @property
    def stats(self) -> Stats:
        """Bytes and seconds so far, and of the last step."""
        return self._session.engine.stats

    # Changing the hook.

    def swap(self, hook: object, **options: Any) -> None:
        """Replace the hook; the step count and the figures go on, the former hook's memory is dropped.

        Args:
            hook, options: as for ``register``; ``wire`` is one of the options and is not carried over.

        Raises:
            HookMismatchError, RegistrationError: as ``register``; the former hook then stays.
        """
        self._check_usable()
        self._replace(lambda: choose(hook, options))
        self._announce("swapped")

    def schedule(self, hooks: Mapping[int, object]) -> None:
        """Swap by itself: ``{1000: "powersgd_rank2", 5000: "fp16"}`` swaps when that many steps are done.

        Raises:
            HookOptionError, UnknownHookError: for any of the hooks, now and not when its turn comes.
            HookMismatchError: if the ranks' schedules differ.
            RegistrationError: for a step that has passed.
        """
        self._check_usable()
        failure: BaseException | None = None
        texts: dict[int, str] = {}
        try:
            for step, hook in sorted(hooks.items()):
                if isinstance(step, bool) or not isinstance(step, int) or step < self.step:
                    raise RegistrationError(f"schedule: {step!r} is no step to come; {self.step} are done.")
                if not isinstance(hook, str):
                    raise RegistrationError("schedule takes hook strings or HookType members, so that it can be shown.")
                texts[step] = str(getattr(hook, "value", hook))
                choose(hook, {}).make()
        except BaseException as error:  # noqa: BLE001 - it is raised again, after the peers were told
            failure = error
        meeting = Meeting.of(self._ground.group, self._ground.timeout)
        agree(meeting, "schedule", {"schedule": texts}, failure, verify=self._ground.verify)
        self._schedule = texts
        if self._slot is not None:
            self._slot.after = self._follow_schedule
        self._follow_schedule()

    def _follow_schedule(self) -> None:
        timetable = self._session.engine.timetable
        if timetable is not None and timetable.is_open:
            return  # the optimizers have yet to use this step's gradients; the timetable calls again
        due = [step for step in self._schedule if step <= self.step]
        if due:
            text = self._schedule[max(due)]
            for step in due:
                del self._schedule[step]
            self.swap(text)

    def finish(self) -> None:
        """Run what is still outstanding: an average that fell due and that no optimizer's step or forward has run.

        Collective. ``state_dict`` and ``save`` do it by themselves. At the end of training ``remove`` also averages the
        parameters a last time, so that all ranks hold the same.

        Raises:
            HookError: what went wrong with the average.
        """
        timetable = self._session.engine.timetable
        if timetable is not None and not self._session.engine.in_step:
            timetable.settle()

    def remove(self) -> None:
        """Give the model back its plain average, with the same parameters on all ranks.

        The registration cannot be used again.
        """
        self._check_usable()
        self._schedule.clear()
        self._replace(lambda: Chosen(name="none", make=PlainMean), "remove")
        self._removed = True
        if self._slot is not None:
            self._slot.owner = None
            self._slot.after = None
        else:
            stop(self._session.engine)

    def emulate(self, network: Network | None) -> None:
        """Make every collective take at least as long as it would on ``network``, from the next step on.

        Raises:
            RegistrationError: for CUDA gradients, whose collectives no thread waits for.
        """
        if network is not None and self._ground.device.type != "cpu":
            raise RegistrationError("a network can be emulated for gradients in host memory only.")
        self._network = network
        self._session.engine.driver.network = network

    def _check_usable(self) -> None:
        if self._removed:
            raise RegistrationError("this registration was removed. Call commhub.register again.")
        if self._session.engine.in_step:
            raise RegistrationError("a step is under way; swap, schedule and remove between steps.")

    def _replace(self, choose_one: Callable[[], Chosen], call: str = "swap") -> None:
        former = self._session
        session = start(self._ground, choose_one, former.engine, call=call)
        session.engine.step = latest(former.engine.step, session.engine, self._ground.device)
        session.engine.stats = former.engine.stats
        session.engine.driver.network = self._network
        self._level(former)
        self._session = session
        self._take(session)
        stop(former.engine)

    def _level(self, session: Session) -> None:
        """Leave all ranks with the same parameters, where an averager let them drift apart; then nothing would."""
        timetable = session.engine.timetable
        failure = None if timetable is None else timetable.level()
        if failure is not None:
            logger.warning("the parameters were not averaged a last time, and may differ between ranks: %s", failure)

    def _take(self, session: Session) -> None:
        self._closing.detach()  # it would keep the former hook's groups and connections open
        self._closing = weakref.finalize(self._slot or self, session.engine.driver.close)
        if session.engine.timetable is not None:
            session.engine.timetable.then = weakref.WeakMethod(self._follow_schedule)
        if self._slot is not None:
            self._slot.owner, self._slot.engine, self._slot.scaler = self, session.engine, self._ground.scaler
            self._slot.show(str(self))

    def _retire(self) -> None:
        """Another registration has taken the model over."""
        self._removed = True
        self._closing.detach()
        self._level(self._session)
        stop(self._session.engine)

    def _announce(self, verb: str) -> None:
        engine = self._session.engine
        if engine.rank == 0:
            logger.info("%s %s on %d ranks at step %d", verb, self, engine.world_size, self.step)

    # Saving.

    def state_dict(self) -> dict[str, Any]:
        """What this rank needs to go on exactly: plain tensors, numbers and strings, loadable with weights_only.

        Each rank's dict is its own: save all of them. With an averager every rank must call this, as it does
        ``finish``'s work first.
        """
        self.finish()
        engine = self._session.engine
        return _saving.to_dict(str(self), self.step, engine.rank, engine.world_size, engine.state)

    def load_state_dict(self, state: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> None:
        """Go on from what was saved. With a schedule every rank must call it: the hook may have to be swapped first.

        Args:
            state: this rank's dict; or those of all former ranks, which may have been more or fewer: then the mean
                of the residuals is kept.

        Raises:
            ValueError: if it is of another hook, model or rank, or incomplete. Nothing is changed then.
        """
        self.finish()
        if self._schedule:
            self._catch_up(state)
        merged = _saving.merge(state)
        engine = self._session.engine
        _saving.from_dict(merged, str(self), engine.rank, engine.world_size, engine.state)
        engine.step = int(merged["step"])

    def _catch_up(self, state: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> None:
        """Swap to the hook that was scheduled for the state's step; collective, as a swap is."""
        failure: BaseException | None = None
        step, text = 0, None
        try:
            merged = _saving.merge(state)
            step = int(merged["step"])
            text = self._schedule.get(max((at for at in self._schedule if at <= step), default=-1))
            _saving.check_hook(merged, str(self) if text is None else choose(text, {}).text())
        except BaseException as error:  # noqa: BLE001 - it is raised again, after the peers were told
            failure = error
        meeting = Meeting.of(self._ground.group, self._ground.timeout)
        agree(meeting, "load", {"step": step}, failure)
        if text is not None:
            self._schedule = {at: hook for at, hook in self._schedule.items() if at > step}
            self.swap(text)

    def save(self, directory: str | Path) -> None:
        """Write each rank's state to a file of its own in ``directory``, which all ranks share."""
        failure: Exception | None = None
        engine = self._session.engine
        try:
            _saving.write(Path(directory), engine.rank, self.state_dict())
        except Exception as error:  # noqa: BLE001 - it is raised again, after the peers were told
            failure = error
        self._meet("save", failure)

    def load(self, directory: str | Path) -> None:
        """Go on from what ``save`` wrote, with as many ranks or with others.

        Raises:
            ValueError: if a file is missing or does not belong to the others.
        """
        failure: Exception | None = None
        states: list[dict[str, Any]] = []
        try:
            states = _saving.read(Path(directory))
        except Exception as error:  # noqa: BLE001 - it is raised again, after the peers were told
            failure = error
        self._meet("read", failure)
        with torch.no_grad():
            try:
                self.load_state_dict(states)
            except Exception as error:  # noqa: BLE001 - the same
                failure = error
        self._meet("load", failure)

    def _meet(self, topic: str, failure: Exception | None) -> None:
        agree(Meeting.of(self._ground.group, self._ground.timeout), topic, {"step": self.step}, failure)

    def close(self) -> None:
        """Stop the communication thread and free the group, on this rank alone, averaging nothing.

        For a process that trains no more. The hook object may be registered again.
        """
        with contextlib.suppress(RuntimeError):
            stop(self._session.engine)
