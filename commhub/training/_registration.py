"""A registered hook: what the user holds to read figures, save, swap and remove it."""

from __future__ import annotations

import contextlib
import weakref
from typing import TYPE_CHECKING, Any

from commhub._errors import RegistrationError
from commhub.drivers._network import Network
from commhub.registry._recipe import Recipe
from commhub.training.rendezvous._everywhere import agree_everywhere
from commhub.training.saving._phases import everyone_of, folder_of, rendezvous_of, save
from commhub.training.saving._saved import to_dict
from commhub.training.saving._saving import select
from commhub.training.steps._own_hooks import PlainMean

from ._fit import made
from ._loading import load, load_alone
from ._running import Running
from ._schedule import Schedule, next_one
from ._watching import Watched

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from commhub.drivers._stats import Stats
    from commhub.protocol._hook import Averager, Hook
    from commhub.training.attachments._attachment import Attachment

    from ._session import Session


class Registration(Watched):
    """One hook registered on one model. ``commhub.register`` makes it; ``str()`` is the hook string it runs.

    ``swap``, ``schedule``, ``remove``, ``save`` and ``load`` are collective: every rank calls them, between steps.
    """

    def __init__(self, session: Session, attachment: Attachment) -> None:
        self._schedule = Schedule()
        followers = weakref.WeakMethod(self._follow_schedule), weakref.WeakMethod(self._after_step)
        self._running = Running(session, attachment, self, *followers)
        self._running.begin()

    @property
    def _session(self) -> Session:
        return self._running.session

    def __str__(self) -> str:
        return str(self._session)

    def __repr__(self) -> str:
        return f"<commhub registration of {self} at step {self.step}>"

    @property
    def hook(self) -> Hook | Averager:
        """The hook object at work; the averager, where one was registered by itself."""
        return self._session.hook

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
        self._running.replace(lambda: next_one(hook, options))
        self._running.announce("swapped")

    def schedule(self, hooks: Mapping[int, object]) -> None:
        """Swap by itself: ``{1000: "powersgd_rank2", 5000: "fp16"}`` swaps when that many steps are done.

        Raises:
            HookOptionError, UnknownHookError: for any of the hooks, now and not when its turn comes.
            HookMismatchError: if the ranks' schedules differ.
            RegistrationError: for a step that has passed.
        """
        self._running.check_registered("schedule")
        failure: BaseException | None = None
        schedule, target = Schedule(), self._session.target
        try:
            self._check_usable()
            self.finish()
            schedule = Schedule.of(hooks, self.step, lambda chosen: made(target, chosen))
        except BaseException as error:  # noqa: BLE001 - it is raised again, after the peers were told
            failure = error
        rendezvous = rendezvous_of(target)
        facts = {"schedule": schedule.texts}
        agree_everywhere(rendezvous, everyone_of(target), "schedule", facts, failure, verify=target.verify)
        self._schedule = schedule
        self._running.call_after_steps()
        self._follow_schedule()

    def _after_step(self) -> None:
        self._running.report()
        self._follow_schedule()

    def _follow_schedule(self) -> None:
        timetable, text = self._session.timetable, self._schedule.due(self.step)
        if text is not None and timetable is not None and timetable.is_open:
            timetable.hold()  # the optimizers have yet to use this step's gradients; it calls again
        elif text is not None:
            self._schedule.drop(self.step)
            self.swap(text)

    def finish(self) -> None:
        """Run what is still outstanding: an average that fell due and that no optimizer's step or forward has run.

        Collective. ``state_dict`` and ``save`` do it by themselves. ``remove`` also averages a last time.

        Raises:
            RegistrationError: if one is due, and the parameters were moved since the backward before.
            HookError: what went wrong with the average.
        """
        self._running.check_registered()
        timetable = self._session.timetable
        if timetable is not None and not self._session.engine.in_step:
            timetable.finish()

    def remove(self) -> None:
        """Give the model back its plain average, with the same parameters on all ranks.

        The registration cannot be used again.
        """
        self._running.replace(lambda: Recipe(name="none", instance=PlainMean()), "remove")
        self._schedule = Schedule()
        self._running.end()

    def emulate(self, network: Network | str | None) -> None:
        """Make every collective take at least as long as it would on ``network``, from the next step on.

        A text such as ``"100mbit"`` is a network's bandwidth.

        Raises:
            HookOptionError: if it is no network.
            RegistrationError: for CUDA gradients, whose collectives no thread waits for.
        """
        self._running.check_registered()
        network = Network.of(network)
        if network is not None and self._session.target.device.type != "cpu":
            raise RegistrationError("a network can be emulated for gradients in host memory only.")
        self._session.emulate(network)

    def _check_usable(self) -> None:
        self._running.check_usable()

    def _move(self, attachment: Attachment) -> None:
        """The model has got another attachment to feed the session from now on."""
        self._running.move(attachment)

    def _retire(self, session: Session) -> None:
        """Another registration has taken the model over with ``session``."""
        self._running.retire(session)

    def _withdraw(self) -> None:
        """What registered it has failed on some rank: it ends on each by itself."""
        self._running.withdraw()

    def state_dict(self) -> dict[str, Any]:
        """What this rank needs to go on exactly: plain tensors, numbers and strings, loadable with weights_only.

        Each rank's dict is its own: save all of them. With an averager every rank must call this, as it does
        ``finish``'s work first.
        """
        self.finish()
        engine = self._session.engine
        part = self._session.target.part
        return to_dict(str(self), self.step, engine.rank, engine.world_size, engine.state, part)

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
        self._running.check_registered("load" if self._schedule else "")
        go_on = load if self._schedule else load_alone
        go_on(self._running, self._schedule, lambda rank, size: select(state, rank, size))

    def save(self, directory: str | Path) -> None:
        """Write all ranks' state into ``directory``, which all ranks share, in place of what an earlier ``save`` wrote.

        The former checkpoint can be loaded until the new one is complete, whatever happens to any rank meanwhile.

        Raises:
            CheckpointError: on every rank, if it failed on any; the former checkpoint stays.
            HookError: what went wrong with an average that was due.
        """
        self._running.check_registered("save")
        save(self._session.target, directory, self.state_dict)

    def load(self, directory: str | Path) -> None:
        """Go on from what ``save`` wrote, with as many ranks or with others.

        An average that is due is dropped: its parameters are of the time before.

        Raises:
            CheckpointError: on every rank, if a file is missing, damaged or of another hook or model for any of them.
                Nothing is changed then on any rank.
        """
        self._running.check_registered("load")
        load(
            self._running,
            self._schedule,
            lambda rank, size: folder_of(self._session.target, directory).read(rank, size),
        )

    def close(self) -> None:
        """Stop the communication thread and free the group, on this rank alone, averaging nothing.

        For a process that trains no more. The hook object may be registered again.
        """
        with contextlib.suppress(RuntimeError):
            self._session.stop("has closed its registration")
