"""Saving and loading on all ranks or on none: what may fail on one rank is done between two rendezvous."""

from __future__ import annotations

import contextlib
import json
from functools import partial
from typing import TYPE_CHECKING, Any

from commhub._errors import CheckpointError, CommhubError, described
from commhub.drivers._store import within
from commhub.training.rendezvous._agree import Rendezvous
from commhub.training.rendezvous._everywhere import LATER, agree_everywhere, among

from ._folder import Folder
from ._manifest import Entry
from ._saved import check_finite

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from commhub.training._target import Target


class Phases:
    """The phases of one saving or loading. In each, every rank does its part and hears how the others fared.

    Args:
        target: whose ranks.
        doing: what they are about, for errors.
    """

    def __init__(self, target: Target, doing: str) -> None:
        self._doing = doing
        self._rendezvous = self._told("", lambda: rendezvous_of(target))
        self._everyone = self._told("", lambda: everyone_of(target))
        self.rank, self.size = self._rendezvous.rank, self._rendezvous.size
        self._meets = self._rendezvous if self._everyone is None else self._everyone

    @contextlib.contextmanager
    def phase(self, so: str = "", *, more: bool = True) -> Iterator[dict[str, Any]]:
        """Do the block on every rank, and go on if it went well on all.

        Args:
            so: what a failure here means for what there was before.
            more: whether another phase follows.

        What the block puts into the dict that it is given must be the same on all ranks, and JSON-able.

        Raises:
            CommhubError: what failed here.
            CheckpointError: what failed on another rank, with its number and reason; or what failed here, where that
                was no CommhubError.
            BaseException: what was to end this process, once the peers know.
        """
        failure: BaseException | None = None
        facts: dict[str, Any] = {}
        try:
            yield facts
        except Exception as error:  # noqa: BLE001 - it is raised again, after the peers were told
            failure = error
            if not isinstance(error, CommhubError):
                failure = CheckpointError(f"{self._doing}: {described(error)}")
                failure.__cause__ = error
        except BaseException as error:  # noqa: BLE001 - the same
            failure = error
        agreed = partial(agree_everywhere, self._rendezvous, self._everyone, self._doing, facts, failure, more=more)
        self._told(so, agreed, failure)

    def _told(self, so: str, function: Callable[[], Any], failure: BaseException | None = None) -> Any:
        """What the function returns; of its errors, one class on all ranks, so that all can do the same about it."""
        try:
            return function()
        except CommhubError as error:
            if error is failure:
                raise
            raise CheckpointError(f"{self._doing}: {error} {so}".strip()) from error

    @property
    def leads(self) -> bool:
        """Whether this rank is the first of all."""
        return bool(self._meets.rank == 0)

    def give(self, part: str, entry: Entry) -> None:
        """Tell the first of all of this rank's file, within a phase."""
        text = json.dumps([part, self.rank, entry.file, entry.bytes, entry.blake2b])
        store = self._meets.branch("files")
        within(self._meets.timeout, lambda: store.set(str(self._meets.rank), text))

    def given(self) -> dict[str, list[Entry]]:
        """On the first of all, after that phase: the files, by part of the model and in rank order."""
        store, ranks = self._meets.branch("files"), range(self._meets.size)
        found = within(self._meets.timeout, lambda: sorted(json.loads(store.get(str(rank))) for rank in ranks))
        parts: dict[str, list[Entry]] = {}
        for part, _, *entry in found:
            parts.setdefault(part, []).append(Entry(*entry))
        return parts


def rendezvous_of(target: Target) -> Rendezvous:
    """Where the ranks meet that average the same part as this one."""
    return Rendezvous.of(target.group, target.timeout, numbered=target.others is not None)


def everyone_of(target: Target) -> Rendezvous | None:
    """Where the ranks meet that average any part of the model, if it has several."""
    return among(target.everyone, LATER * target.timeout) if target.everyone else None


def folder_of(target: Target, directory: str | Path) -> Folder:
    """The directory, for this rank's part of the model.

    Raises:
        CheckpointError: if ``directory`` is no path.
    """
    return Folder(directory, target.part)


def save(target: Target, directory: str | Path, state_dict: Callable[[], dict[str, Any]]) -> None:
    """Replace the checkpoint in ``directory``, or make the first one.

    Raises:
        CommhubError: as ``Phases.phase``.
    """
    phases = Phases(target, "save")
    so = "What the directory held before is as it was."
    with phases.phase(so) as facts:
        state = state_dict()  # first, and on every rank: an average may be due, which all of them make together
        check_finite(state)
        facts["step"] = state["step"]
        folder = folder_of(target, directory)
        folder.make()
        if phases.leads:
            folder.tidy()
    with phases.phase(so):
        phases.give(target.part, folder.write(phases.rank, state))
    with phases.phase(more=False):
        if phases.leads:
            folder.switch(state["hook"], state["step"], phases.given())
