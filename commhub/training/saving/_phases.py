"""Saving and loading on all ranks or on none: what may fail on one rank is done between two rendezvous."""

from __future__ import annotations

import contextlib
import json
from functools import partial
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from commhub._errors import CheckpointError, CommhubError, described
from commhub.drivers._store import within
from commhub.training.rendezvous._agree import Rendezvous
from commhub.training.rendezvous._everywhere import LATER, agree_everywhere

from ._folder import Entry, Folder
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
        self._rendezvous = self._told("", lambda: Rendezvous.of(target.group, target.timeout))
        self._others = self._told("", lambda: others_of(target))
        self.rank, self.size = self._rendezvous.rank, self._rendezvous.size

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
        agreed = partial(agree_everywhere, self._rendezvous, self._others, self._doing, facts, failure, more=more)
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
        """Whether this rank is the first of those that average its part, and of those that it meets of other parts."""
        return self.rank == 0 and (self._others is None or self._others.rank == 0)

    def give(self, entry: Entry) -> None:
        """Tell those of the same part of this rank's file, within a phase."""
        self._set(self._rendezvous, [dist.get_rank(), entry.file, entry.bytes, entry.blake2b])

    def pass_on(self, part: str) -> None:
        """Tell those of the other parts of this part's files, within a phase after that."""
        if self._others is not None:
            self._set(self._others, [part, self._get(self._rendezvous)])

    def given(self, part: str) -> tuple[bool, dict[str, list[Entry]]]:
        """After that phase: whether this rank is the first of all, and all files, by part and in rank order."""
        lists = [[part, self._get(self._rendezvous)]] if self._others is None else self._get(self._others)
        first = min(entry[0] for _, entries in lists for entry in entries)
        return first == dist.get_rank(), {name: [Entry(*entry[1:]) for entry in entries] for name, entries in lists}

    def _set(self, rendezvous: Rendezvous, content: Any) -> None:
        store, text = rendezvous.branch("files"), json.dumps(content)
        within(self._rendezvous.timeout, lambda: store.set(str(rendezvous.rank), text))

    def _get(self, rendezvous: Rendezvous) -> list[Any]:
        store, ranks = rendezvous.branch("files"), range(rendezvous.size)
        return within(self._rendezvous.timeout, lambda: [json.loads(store.get(str(rank))) for rank in ranks])


def others_of(target: Target) -> Rendezvous | None:
    """Where the ranks that average other parts of the model meet, if there are any."""
    return None if target.others is None else Rendezvous.of(target.others, LATER * target.timeout)


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
        phases.give(folder.write(phases.rank, state))
    if target.part:
        with phases.phase(so):
            phases.pass_on(target.part)
    with phases.phase(more=False):
        if phases.leads:
            is_first, files = phases.given(target.part)
            if is_first:
                folder.switch(state["hook"], state["step"], files)
