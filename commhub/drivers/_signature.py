"""Whether all ranks ask for the same collectives, found out before they are issued.

Gloo matches collectives by their order alone, and ends the process where a message is longer than the buffer that
waits for it. So each bucket and stage has a signature: kind, dtype, elements, group, and whose gradients they are. A
rank whose signature is what it was in its step before issues at once; one whose signature is new waits until all of
the group have the same. They count themselves under its digest in the store: two questions to the store per rank. Where
that does not settle it, a rank asks aloud, and its peers, who look around while they wait, answer.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from typing import TYPE_CHECKING, Any

from commhub._errors import HookError

from ._asked import Asked
from ._store import Errand

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch.distributed.distributed_c10d import Store

    from commhub.protocol._spans import Span

    from ._asked import Position, Serial
    from ._task import Task

_REMEMBERED = 3
"""Of each topic, how many serials are remembered to answer with. No peer that needs this rank is further behind."""
_PATIENCE = 0.25
"""Seconds after which a rank asks aloud."""


class Signatures:
    """What this rank has asked for, and its part in comparing that with its peers.

    Args:
        store: where the ranks of a registration meet; a prefix that nothing else uses.
        rank, size: in the registration's group.
    """

    def __init__(self, store: Store, rank: int, size: int) -> None:
        self.store, self.rank, self.size = store, rank, size
        self._before: dict[tuple[str, int], Asked] = {}
        self._log: dict[str, dict[Serial, dict[int, Asked]]] = {}
        self._agreed: dict[str, tuple[Serial, str]] = {}
        self._open: list[dict[str, Any]] = []
        self._owed: list[tuple[str, int]] = []
        self._heard = 0
        self._look: Errand[None] | None = None

    def note(self, task: Task) -> Comparison | None:
        """Take down what a task asks for next, or that it has ended; what to wait for first, if that is new."""
        position = task.position
        if position is None or self.size == 1:
            return None
        asked = self._found(position.topic, position.serial, position.index) or self._enter(position, task.bucket.spans)
        before = self._before.get((position.topic, position.index))
        stage = len(asked.stages)
        if task.finished:
            asked.finished = True
            self._before[position.topic, position.index] = asked
            new = before is not None and len(before.stages) > stage
            group = before.groups[stage] if before is not None and new else None
        else:
            jobs = tuple((j.kind, j.payload.dtype, j.payload.numel(), j.group, j.asked.manner) for j in task.jobs)
            group = task.jobs[0].group if task.jobs else None
            asked.stages.append(jobs)
            asked.groups.append(group)
            new = (
                before is None
                or len(before.stages) <= stage
                or before.stages[stage] != jobs
                or before.position.era != position.era
                or (before.spans is not asked.spans and before.spans != asked.spans)
            )
        members = tuple(range(self.size)) if group is None else group.ranks
        if not new or not position.compared or len(members) == 1 or not (task.finished or task.jobs):
            return None
        return Comparison(self, asked, stage, members)

    def _enter(self, position: Position, spans: tuple[Span, ...]) -> Asked:
        serials = self._log.setdefault(position.topic, {})
        if position.serial not in serials:
            serials[position.serial] = {}
            for old in sorted(serials)[:-_REMEMBERED]:
                del serials[old]
        asked = serials[position.serial][position.index] = Asked(position, spans)
        return asked

    def _found(self, topic: str, serial: Serial, index: int) -> Asked | None:
        return self._log.get(topic, {}).get(serial, {}).get(index)

    def issued(self) -> list[list[Any]]:
        """What this rank has asked for lately: topic, serial, index and number of stages of each task."""
        return [
            [topic, list(serial), index, len(asked.stages)]
            for topic, serials in self._log.items()
            for serial, tasks in serials.items()
            for index, asked in tasks.items()
        ]

    def count(self, key: str, members: int) -> None:
        """Say that this rank asks for what ``key`` stands for."""
        if int(self.store.add(key, 1)) == members:
            self.store.set(f"{key}/all", "")

    def agree(self, where: str, serial: Serial, key: str) -> str | None:
        """Note that this rank asks for what ``key`` stands for; the key that it had at this position before."""
        former = self._agreed.get(where)
        self._agreed[where] = serial, key
        return None if former is None else former[1]

    def answer(self, waiting: Sequence[Task]) -> None:
        """Answer the peers who ask aloud.

        Args:
            waiting: the tasks for whose collectives this rank waits, or which it holds back itself.

        Raises:
            HookError: where a peer asks for something else than this rank does.
        """
        self._look = self._look or Errand(self._hear)
        if not self._look.wait(_PATIENCE):
            return  # the store does not answer; a later call takes what it says
        look, self._look = self._look, None
        with contextlib.suppress(RuntimeError):  # the store is gone: nobody can ask or be answered
            look.result()
        self._open = [question for question in self._open if not self._answered(question, waiting)]
        if self._owed:
            self._look = Errand(self._hear)

    def _hear(self) -> None:
        while self._owed:
            self.count(*self._owed.pop())
        asked = int(self.store.add("questions", 0))
        if asked > self._heard or self._open:
            self._heard = asked
            slots = [f"question/{rank}" for rank in range(self.size) if rank != self.rank]
            texts = [self.store.get(slot) for slot in slots if self.store.check([slot])]
            questions = [json.loads(text) for text in texts if text]
            self._open = [question for question in questions if self.rank in question["members"]]

    def _answered(self, question: dict[str, Any], waiting: Sequence[Task]) -> bool:
        topic, serial, index, stage = question["position"]
        serial = tuple(serial)
        agreed = self._agreed.get(question["where"])
        if agreed is not None and agreed[0] >= serial and (agreed[0] > serial or agreed[1] == question["key"]):
            return True
        asked = self._found(topic, serial, index)
        if asked is not None and (asked.finished or len(asked.stages) > stage):
            mine = asked.told(stage, self.size)
            if mine != question["told"]:
                raise self._differs(question, mine)
            if asked.names() != question["names"]:  # as much, of something else
                question["told"] += f" for {question['whose']}"
                raise self._differs(question, f"it for {asked.whose()}")
            self.agree(question["where"], serial, question["key"])
            self._owed.append((question["key"], len(question["members"])))
            return True
        if max(self._log.get(topic, ()), default=()) > serial:
            raise self._differs(question, "nothing more")
        for task in waiting:
            if task.position is not None and task.jobs and self._is_stuck(task, question):
                held = self._found(task.position.topic, task.position.serial, task.position.index)
                told = "nothing" if held is None else held.told(task.stage, self.size)
                raise self._differs(question, f"{told} ({task.position.topic}, bucket {task.position.index})")
        return False

    def _is_stuck(self, task: Task, question: dict[str, Any]) -> bool:
        """Whether a task needs a peer that has stopped before it came there: the two would wait for each other."""
        assert task.position is not None
        group = task.jobs[0].group
        if group is not None and question["rank"] not in group.ranks:
            return False
        position = [task.position.topic, list(task.position.serial), task.position.index]
        return not any(position == theirs[:3] and task.stage < theirs[3] for theirs in question["issued"])

    def _differs(self, question: dict[str, Any], mine: str) -> HookError:
        topic, _, index, _ = question["position"]
        return HookError(
            f"rank {question['rank']} asks for {question['told']} ({topic}, bucket {index}) where rank {self.rank} "
            f"asks for {mine}. Every rank must ask for the same: kinds, shapes and dtypes must not depend on a "
            "rank's own values."
        )


class Comparison:
    """A question to all members of a group: do you ask for this too?"""

    def __init__(self, signatures: Signatures, asked: Asked, stage: int, members: tuple[int, ...]) -> None:
        self._signatures, self._members = signatures, members
        self._stage = stage
        position = asked.position
        told, names = asked.told(stage, signatures.size), asked.names()
        digest = hashlib.sha256(f"{told} {names}".encode()).hexdigest()[:16]
        where = f"{position.topic}/{position.index}/{stage}/{'.'.join(map(str, members))}"
        self._key = f"{where}/{'.'.join(map(str, position.serial))}/{digest}"
        self._former = signatures.agree(where, position.serial, self._key)
        self._question: dict[str, Any] = {
            "rank": signatures.rank,
            "members": members,
            "position": [position.topic, position.serial, position.index, stage],
            "where": where,
            "key": self._key,
            "told": told,
            "names": names,
            "whose": asked.whose(),
        }
        self._asked_aloud = False
        self._errand: Errand[bool] = Errand(self._begin)

    def is_over(self) -> bool:
        """Whether all members ask for this, after waiting for a moment.

        Raises:
            RuntimeError: if the store is gone.
        """
        if not self._errand.wait(2 * _PATIENCE):
            return False
        if self._errand.result():
            return True
        self._errand = Errand(self._go_on)
        return False

    def _begin(self) -> bool:
        self._signatures.count(self._key, len(self._members))
        return self._is_unanimous()

    def _go_on(self) -> bool:
        store = self._signatures.store
        if not self._asked_aloud:
            # What this rank has issued does not change while it waits here.
            question = {**self._question, "issued": self._issued()}
            store.set(f"question/{self._signatures.rank}", json.dumps(question))
            store.add("questions", 1)
            self._asked_aloud = True
        return self._is_unanimous()

    def _issued(self) -> list[list[Any]]:
        position = [self._question["position"][0], list(self._question["position"][1]), self._question["position"][2]]
        return [
            [*entry[:3], entry[3] - 1 if entry[:3] == position and entry[3] > self._stage else entry[3]]
            for entry in self._signatures.issued()
        ]

    def _is_unanimous(self) -> bool:
        store, pause = self._signatures.store, 0.0001
        end = time.monotonic() + _PATIENCE
        while not store.check([f"{self._key}/all"]):
            if time.monotonic() > end:
                return False
            time.sleep(pause)
            pause = min(2 * pause, 0.005)
        if self._asked_aloud:
            store.set(f"question/{self._signatures.rank}", "")
        with contextlib.suppress(RuntimeError, NotImplementedError):  # not every store can forget
            if self._former is not None and self._signatures.rank == self._members[0]:
                store.delete_key(self._former)
                store.delete_key(f"{self._former}/all")
        return True
