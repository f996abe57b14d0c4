"""What ranks reduce in one go: tasks are submitted, waited for, counted, and confirmed by every rank.

Here alone an engine meets its driver.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs
import torch

from commhub.drivers._asked import Position
from commhub.drivers._failure import to_raise
from commhub.drivers._job import Scratch
from commhub.drivers._observers import Observers
from commhub.drivers._task import Task
from commhub.drivers._timeline import Timeline
from commhub.protocol._bucket import Bucket

from ._own_hooks import Failed, Nothing, Sum

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from torch import Tensor

    from commhub._errors import HookError
    from commhub.drivers._driver import Driver
    from commhub.drivers._stats import StepStats
    from commhub.protocol._collectives import Subgroup
    from commhub.protocol._hook import Hook
    from commhub.protocol._spans import Span


@attrs.define(eq=False, kw_only=True)
class Rounds:
    """The rounds of one engine, one after the other.

    Attributes:
        driver: carries them out.
        rank, world_size: in the whole group.
        observers: who is told of what hooks ask for.
        timeline: what happened in the last steps.
    """

    driver: Driver
    rank: int
    world_size: int
    observers: Observers = attrs.Factory(Observers)
    timeline: Timeline = attrs.Factory(Timeline)
    _groups: set[Subgroup] = attrs.Factory(set)
    _scratch: Scratch = attrs.Factory(Scratch)
    _unheard: bool = False
    _counts: dict[str, int] = attrs.Factory(dict)

    @property
    def has_failed(self) -> bool:
        """Whether something went wrong: nothing is carried out any more."""
        return self.driver.failure is not None

    @property
    def is_idle(self) -> bool:
        """Whether no hook's code and no collective goes on in what was given up."""
        return not self.driver.in_use()

    @property
    def failure(self) -> HookError | None:
        """What went wrong, once something has: a copy, to be raised."""
        return None if self.driver.failure is None else to_raise(self.driver.failure)

    def begin(self, step: int) -> None:
        """A step begins: what goes before it is over, and what follows is its own."""
        self.catch_up()
        self.timeline.begin(step)

    def take_over(self, former: Rounds) -> None:
        """Go on with what outlives a hook: who observes, and what happened."""
        self.observers, self.timeline = former.observers, former.timeline

    def connect(self, groups: Sequence[Sequence[int]]) -> Sequence[Subgroup]:
        """Make communicators among disjoint groups of ranks, and know those that hold this rank from others' own."""
        made = self.driver.connect(groups)
        self._groups.update(group for group in made if self.rank in group.ranks)
        return made

    def next(self, topic: str, group: Subgroup | None) -> tuple[str, int]:
        """The name of what ranks of ``group`` do together between buckets of a step, and how often they have."""
        name = topic if group is None else f"{topic} among {', '.join(map(str, group.ranks))} ({group.key})"
        self._counts[name] = self._counts.get(name, 0) + 1
        return name, self._counts[name]

    def submit(
        self,
        hook: Hook,
        bucket: Bucket,
        position: Position,
        *,
        wire: torch.dtype | None = None,
        watch: bool = False,
        logical_bytes: float = 0.0,
        observed: bool = True,
        last: bool = False,
        done: Callable[[], None] = lambda: None,
    ) -> Task:
        """Begin to reduce one bucket.

        Args:
            hook, bucket, position, wire, watch, done: as for a ``Task``.
            logical_bytes: what a plain all-reduce would send.
            observed: whether observers are told of it.
            last: whether nothing more comes before it is waited for.
        """
        task = Task(
            hook,
            bucket,
            world=self.world_size,
            wire=wire,
            scratch=self._scratch,
            meter=self.driver.meter,
            watch=watch,
            purpose="word" if not observed else "gradients" if position.topic == "step" else "parameters",
            position=position,
            observers=self.observers if observed else None,
            groups=self._groups,
            done=done,
        )
        if task.record is not None:
            task.record.logical_bytes = logical_bytes
        self.driver.submit(task)
        if last:
            self.driver.end_round()
        return task

    def future(self) -> torch.futures.Future[Tensor]:
        """A future for a bucket, to be completed from ``done``."""
        return self.driver.future()

    def bucket(
        self,
        flat: Tensor,
        parameters: Sequence[Tensor] = (),
        spans: tuple[Span, ...] = (),
        *,
        step: int,
        index: int = 0,
        used: tuple[bool, ...] | None = None,
        group: Subgroup | None = None,
        shard: Tensor | None = None,
    ) -> Bucket:
        """A bucket; its rank and size are those in ``group``."""
        size = self.world_size if group is None else len(group)
        return Bucket(
            flat=flat,
            parameters=tuple(parameters),
            used=(True,) * len(parameters) if used is None else used,
            index=index,
            step=step,
            divisor=size,
            rank=self.rank if group is None else group.ranks.index(self.rank),
            world_size=size,
            group=group,
            shard=shard,
            spans=spans,
        )

    def sum(self, flat: Tensor, step: int, group: Subgroup | None = None) -> None:
        """Begin to add up one short tensor per rank among a group, outside of what observers see."""
        bucket = self.bucket(flat, step=step, group=group)
        topic, number = self.next("sum", group)
        self.submit(Sum(), bucket, Position(topic, (number,), compared=False), observed=False)

    def sum_now(self, flat: Tensor, step: int, *, counted: bool) -> None:
        """Add up and wait. Its figures count for the round that follows, if they are to be ``counted``."""
        self.catch_up()
        self.sum(flat, step)
        if counted:
            self.wait()
        else:
            self.finish()

    def run(
        self,
        hook: Hook,
        buckets: Iterable[Bucket],
        topic: str,
        group: Subgroup | None,
        *,
        step: int,
        wire: torch.dtype | None,
        watch: bool,
        flag: Tensor | None,
        observed: bool,
    ) -> StepStats:
        """A whole round of a group between steps, confirmed; its figures."""
        self.catch_up()
        topic, number = self.next(topic, group)
        for bucket in buckets:
            position = Position(topic, (number,), bucket.index)
            self.submit(hook, bucket, position, wire=wire, watch=watch, observed=observed)
        figures = self.finish()
        self.confirm([group], step, flag=flag)
        return figures

    def wait(self) -> None:
        """Wait for all that was submitted; its figures count for the round that follows."""
        self.driver.wait()

    def finish(self) -> StepStats:
        """Wait for all that was submitted; its figures. What went wrong is in ``failure``."""
        self.driver.wait()
        done = self.driver.meter.take()
        self.timeline.add(done)
        return done.figures()

    def confirm(
        self, groups: Iterable[Subgroup | None], step: int, *, flag: Tensor | None = None, linger: bool = False
    ) -> None:
        """Hear from every rank that its round ended well, in a round of one element, which no figures count.

        Args:
            groups: the groups to hear from.
            step: under whose number it fails.
            flag: what is summed meanwhile; where there is one, this happens even if the driver needs no such word.
            linger: do not wait, because the peers wait for something else of this rank first; ``catch_up`` does.
        """
        if self.has_failed or self.world_size == 1 or not (self.driver.confirms or flag is not None):
            return
        for group in groups:
            self.sum(torch.zeros(1) if flag is None else flag, step, group)
        self._unheard = True
        if linger:
            self.driver.end_round()
        else:
            self.catch_up()

    def leave_out(self, position: Position, step: int) -> None:
        """Have the ranks compare that nothing is asked for at a position, where they compare at all."""
        if self.driver.confirms:
            self.submit(
                Nothing(), self.bucket(torch.zeros(1), step=step, index=position.index), position, observed=False
            )

    def fail(self, text: str, step: int) -> None:
        """Carry nothing out any more: what these rounds are a part of has failed elsewhere, as ``text`` says."""
        topic, number = self.next("failure elsewhere", None)
        self.submit(Failed(text), self.bucket(torch.zeros(1), step=step), Position(topic, (number,), compared=False))
        self.finish()

    def catch_up(self) -> None:
        """Wait for a word that nobody has waited for yet."""
        if self._unheard:
            self._unheard = False
            self.finish()
