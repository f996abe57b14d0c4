"""Saving and loading on all ranks or on none: what may fail on one rank is done between two rendezvous."""

from __future__ import annotations

import contextlib
import json
from typing import TYPE_CHECKING, Any

from commhub._errors import CheckpointError, CommhubError, described
from commhub.drivers._store import within
from commhub.registry._recipe import choose
from commhub.training._agree import Rendezvous, agree
from commhub.training._start import stop

from . import _saving
from ._folder import Entry, Folder
from ._saved import check_finite

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from commhub.training._registration import Registration
    from commhub.training._target import Target


class Together:
    """The rounds of one saving or loading. In each, every rank does its part and hears how the others fared.

    Args:
        target: whose ranks.
        doing: what they are about, for errors.
    """

    def __init__(self, target: Target, doing: str) -> None:
        self._doing = doing
        self._rendezvous = self._told("", lambda: Rendezvous.of(target.group, target.timeout))
        self.rank, self.size = self._rendezvous.rank, self._rendezvous.size

    @contextlib.contextmanager
    def round(self, so: str = "", *, more: bool = True) -> Iterator[dict[str, Any]]:
        """Do the block on every rank, and go on if it went well on all.

        Args:
            so: what a failure here means for what there was before.
            more: whether another round follows.

        What the block puts into the dict that it is given must be the same on all ranks, and JSON-able.

        Raises:
            CommhubError: what failed here.
            CheckpointError: what failed on another rank, with its number and reason; or what failed here, where that
                was no CommhubError.
        """
        failure: CommhubError | None = None
        facts: dict[str, Any] = {}
        try:
            yield facts
        except CommhubError as error:
            failure = error
        except Exception as error:  # noqa: BLE001 - it is raised again, after the peers were told
            failure = CheckpointError(f"{self._doing}: {described(error)}")
            failure.__cause__ = error
        self._told(so, lambda: agree(self._rendezvous, self._doing, facts, failure, more=more), failure)

    def _told(self, so: str, function: Callable[[], Any], failure: CommhubError | None = None) -> Any:
        """What the function returns; of its errors, one class on all ranks, so that all can do the same about it."""
        try:
            return function()
        except CommhubError as error:
            if error is failure:
                raise
            raise CheckpointError(f"{self._doing}: {error} {so}".strip()) from error

    def give(self, entry: Entry) -> None:
        """Tell rank 0 of this rank's file, within a round."""
        text = json.dumps([entry.file, entry.bytes, entry.blake2b])
        store = self._rendezvous.branch("files")
        within(self._rendezvous.timeout, lambda: store.set(str(self.rank), text))

    def given(self) -> list[Entry]:
        """On rank 0, after that round: the files in rank order."""
        store = self._rendezvous.branch("files")
        ranks = range(self.size)
        return within(self._rendezvous.timeout, lambda: [Entry(*json.loads(store.get(str(rank)))) for rank in ranks])


def save(target: Target, directory: str | Path, state_dict: Callable[[], dict[str, Any]]) -> None:
    """Replace the checkpoint in ``directory``, or make the first one.

    Raises:
        CommhubError: as ``Together.round``.
    """
    together = Together(target, "save")
    so = "What the directory held before is as it was."
    with together.round(so) as facts:
        state = state_dict()  # first, and on every rank: an average may be due, which all of them make together
        check_finite(state)
        facts["step"] = state["step"]
        folder = Folder(directory)
        folder.make()
        if together.rank == 0:
            folder.tidy()
    with together.round(so):
        together.give(folder.write(together.rank, state))
    with together.round(more=False):
        if together.rank == 0:
            folder.switch(state["hook"], state["step"], together.given())


def load(registration: Registration, take: Callable[[int, int], _saving.Part], *, alone: bool = False) -> None:
    """Check what every rank takes, meet, then change. A hook that the schedule asks for is prepared beside the former.

    Args:
        registration: which goes on.
        take: given rank and world size, finds what this rank goes on from.
        alone: whether this rank calls for itself: there is no schedule, and no rendezvous.

    Raises:
        CommhubError: as ``Together.round``.
    """
    former = registration._session
    if alone:
        registration._check_usable()
        part = take(former.engine.rank, former.engine.world_size)
        _saving.check_hook(part, former.chosen)
        _change(registration, _saving.fit(part, former.engine.state))
        return
    together = Together(registration._target, "load")
    so = "Nothing was changed on any rank."
    with together.round(so) as facts:
        registration._check_usable()
        part = take(together.rank, together.size)
        due = [step for step in registration._schedule if step <= part.step]
        text = registration._schedule[max(due)] if due else None
        _saving.check_hook(part, former.chosen if text is None else choose(text, {}))
        facts.update({"checkpoint": part.source, "step": part.step, "hook": text})
    session = former if text is None else registration._started(lambda: choose(text, {}), "load", loading=True)
    try:
        with together.round(so):
            part = _saving.fit(part, session.engine.state)
            if former.engine.timetable is not None:
                former.engine.timetable.join()
    except BaseException:
        if session is not former:
            stop(session.engine)
        raise
    with together.round(more=False):
        if session is not former:
            registration._install(session, loading=True)
            registration._announce("swapped")
        _change(registration, part)


def _change(registration: Registration, part: _saving.Part) -> None:
    engine = registration._session.engine
    if engine.timetable is not None:
        engine.timetable.forget()
    _saving.restore(part, engine.state)
    engine.step = part.step
    registration._schedule = {at: hook for at, hook in registration._schedule.items() if at > part.step}
