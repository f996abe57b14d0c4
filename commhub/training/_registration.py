"""A registered hook: what the user holds to read figures, save, swap and remove it."""

from __future__ import annotations

import contextlib
import logging
import weakref
from typing import TYPE_CHECKING, Any

from commhub._errors import RegistrationError
from commhub.registry._recipe import Recipe, choose
from commhub.training.saving import _saving
from commhub.training.saving._folder import Folder
from commhub.training.saving._saved import to_dict
from commhub.training.saving._together import load, save

from ._agree import Rendezvous, agree
from ._own_hooks import PlainMean
from ._start import Session, at_work, latest, start, stop

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from commhub.drivers._network import Network
    from commhub.drivers._stats import Stats
    from commhub.protocol._hook import Averager, Hook

    from ._slot import Slot
    from ._target import Target

logger = logging.getLogger("commhub")


class Registration:
    """One hook registered on one model. ``commhub.register`` makes it; ``str()`` is the hook string it runs.

    ``swap``, ``schedule``, ``remove``, ``save`` and ``load`` are collective: every rank calls them, between steps.
    """

    def __init__(self, target: Target, session: Session, slot: Slot | None) -> None:
        self._target, self._session, self._slot, self._removed = target, session, slot, False
        self._schedule: dict[int, str] = {}
        self._network: Network | None = None
        self._closing: Any = weakref.finalize(self, bool)
        self._attach(session)
        self._announce("registered")

    def __str__(self) -> str:
        return str(self._session.chosen)

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
            self.finish()
            for step, hook in sorted(hooks.items()):
                if isinstance(step, bool) or not isinstance(step, int) or step < self.step:
                    raise RegistrationError(f"schedule: {step!r} is no step to come; {self.step} are done.")
                if not isinstance(hook, str):
                    raise RegistrationError("schedule takes hook strings or HookType members, so that it can be shown.")
                texts[step] = str(getattr(hook, "value", hook))
                choose(hook, {}).make()
        except BaseException as error:  # noqa: BLE001 - it is raised again, after the peers were told
            failure = error
        rendezvous = Rendezvous.of(self._target.group, self._target.timeout)
        agree(rendezvous, "schedule", {"schedule": texts}, failure, verify=self._target.verify)
        self._schedule = texts
        if self._slot is not None:
            self._slot.after = self._follow_schedule
        self._follow_schedule()

    def _follow_schedule(self) -> None:
        timetable = self._session.engine.timetable
        due = [step for step in self._schedule if step <= self.step]
        if due and timetable is not None and timetable.is_open:
            timetable.hold()  # the optimizers have yet to use this step's gradients; it calls again
        elif due:
            text = self._schedule[max(due)]
            for step in due:
                del self._schedule[step]
            self.swap(text)

    def finish(self) -> None:
        """Run what is still outstanding: an average that fell due and that no optimizer's step or forward has run.

        Collective. ``state_dict`` and ``save`` do it by themselves. ``remove`` also averages a last time.

        Raises:
            RegistrationError: if one is due, and the parameters were moved since the backward before.
            HookError: what went wrong with the average.
        """
        timetable = self._session.engine.timetable
        if timetable is not None and not self._session.engine.in_step:
            timetable.finish()

    def remove(self) -> None:
        """Give the model back its plain average, with the same parameters on all ranks.

        The registration cannot be used again.
        """
        self._check_usable()
        self._schedule.clear()
        self._replace(lambda: Recipe(name="none", instance=PlainMean()), "remove")
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
        if network is not None and self._target.device.type != "cpu":
            raise RegistrationError("a network can be emulated for gradients in host memory only.")
        self._network = network
        self._session.engine.driver.network = network

    def _check_usable(self) -> None:
        if self._removed:
            raise RegistrationError("this registration was removed. Call commhub.register again.")
        if self._session.engine.is_left_over:
            self._session.engine.abandon()
        if self._session.engine.in_step:
            raise RegistrationError("a step is under way; swap, schedule and remove between steps.")

    def _replace(self, choose_one: Callable[[], Recipe], call: str = "swap") -> None:
        self._install(self._started(choose_one, call))

    def _started(self, choose_one: Callable[[], Recipe], call: str, *, loading: bool = False) -> Session:
        """Another hook, ready to take over; collective. Until ``_install`` it changes nothing."""
        former = self._session.engine
        session = start(self._target, choose_one, former, call=call, loading=loading)
        session.engine.step = latest(former.step, session.engine, self._target.device)
        return session

    def _install(self, session: Session, *, loading: bool = False) -> None:
        former = self._session
        session.engine.stats = former.engine.stats
        session.engine.driver.network = self._network
        if not loading:  # then the parameters are, or will be, those of the checkpoint
            self._synchronize(former)
        self._session = session
        self._attach(session)
        stop(former.engine)

    def _synchronize(self, session: Session) -> None:
        """Leave all ranks with the same parameters, where an averager let them drift apart; then nothing would."""
        timetable = session.engine.timetable
        failure = None if timetable is None else timetable.synchronize()
        if failure is not None:
            logger.warning("the parameters were not averaged a last time, and may differ between ranks: %s", failure)

    def _attach(self, session: Session) -> None:
        self._closing.detach()  # it would keep the former hook's groups and connections open
        self._closing = weakref.finalize(self._slot or self, session.engine.driver.close)
        if session.engine.timetable is not None:
            session.engine.timetable.then = weakref.WeakMethod(self._follow_schedule)
        if self._slot is not None:
            self._slot.owner, self._slot.engine, self._slot.scaler = self, session.engine, self._target.scaler
            self._slot.show(str(self))

    def _retire(self) -> None:
        """Another registration has taken the model over."""
        self._removed = True
        self._closing.detach()
        self._synchronize(self._session)
        stop(self._session.engine)

    def _announce(self, verb: str) -> None:
        engine = self._session.engine
        if engine.rank == 0:
            logger.info("%s %s on %d ranks at step %d", verb, self, engine.world_size, self.step)
            if verb == "registered" and engine.timetable is not None:
                engine.timetable.advise(str(self))

    def state_dict(self) -> dict[str, Any]:
        """What this rank needs to go on exactly: plain tensors, numbers and strings, loadable with weights_only.

        Each rank's dict is its own: save all of them. With an averager every rank must call this, as it does
        ``finish``'s work first.
        """
        self.finish()
        engine = self._session.engine
        return to_dict(str(self), self.step, engine.rank, engine.world_size, engine.state)

    def load_state_dict(self, state: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> None:
        """Go on from what was saved. An average that is due is dropped: its parameters are of the time before.

        Each rank calls it for itself, and all end if it fails on one; with a schedule it is collective, as a swap is.

        Args:
            state: this rank's dict; or those of all former ranks, which may have been more or fewer: then the mean
                of the residuals is kept.

        Raises:
            CheckpointError: if it is of another hook, model or rank, incomplete or damaged. Nothing is changed then;
                with a schedule on no rank.
        """
        load(self, lambda rank, size: _saving.select(state, rank, size), alone=not self._schedule)

    def save(self, directory: str | Path) -> None:
        """Write all ranks' state into ``directory``, which all ranks share, in place of what an earlier ``save`` wrote.

        The former checkpoint can be loaded until the new one is complete, whatever happens to any rank meanwhile.

        Raises:
            CheckpointError: on every rank, if it failed on any; the former checkpoint stays.
            HookError: what went wrong with an average that was due.
        """
        save(self._target, directory, self.state_dict)

    def load(self, directory: str | Path) -> None:
        """Go on from what ``save`` wrote, with as many ranks or with others.

        An average that is due is dropped: its parameters are of the time before.

        Raises:
            CheckpointError: on every rank, if a file is missing, damaged or of another hook or model for any of them.
                Nothing is changed then on any rank.
        """
        load(self, lambda rank, size: Folder(directory).read(rank, size))

    def close(self) -> None:
        """Stop the communication thread and free the group, on this rank alone, averaging nothing.

        For a process that trains no more. The hook object may be registered again.
        """
        with contextlib.suppress(RuntimeError):
            stop(self._session.engine)
