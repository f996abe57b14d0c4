"""Steps and buckets: what lies between gradients that are ready and the driver that averages them.

Knows nothing of DistributedDataParallel; the slot on a DDP model and ``manual`` both feed it.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import attrs
import torch
from torch import Tensor

from commhub.drivers._asked import Position
from commhub.drivers._failure import to_raise
from commhub.drivers._job import Scratch
from commhub.drivers._stats import Stats
from commhub.drivers._task import Task
from commhub.protocol._bucket import Bucket, Span

from ._callbacks import Callbacks, call_after
from ._own_hooks import PlainMean, SparseMean, Sum

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from commhub._errors import HookError
    from commhub.drivers._driver import Driver
    from commhub.protocol._collectives import Subgroup
    from commhub.protocol._hook import Hook
    from commhub.protocol._state import State
    from commhub.training.averaging._timetable import Timetable


@attrs.define(eq=False, kw_only=True)
class Engine:
    """One hook at work on one group: counts buckets and steps, keeps state and figures.

    Attributes:
        hook, state, driver: at work.
        rank, world_size: in the group.
        wire: the registration's wire dtype.
        step: synchronised steps so far.
        stats: the figures.
        callbacks: what the hook asked for.
        timetable: of the averager, if the hook brought one.
    """

    hook: Hook
    state: State
    driver: Driver
    rank: int
    world_size: int
    wire: torch.dtype | None = None
    step: int = 0
    stats: Stats = attrs.Factory(Stats)
    callbacks: Callbacks = attrs.Factory(Callbacks)
    timetable: Timetable | None = None
    _scratch: Scratch = attrs.Factory(Scratch)
    _tasks: list[Task] = attrs.Factory(list)
    _open: bool = False
    _divisor: int = 0
    _divides: bool = False
    _loss_scale: float = 1.0
    _watch: bool = False
    _lingering: bool = False
    _abandoned: int = 0
    _thread: int = 0
    _rounds: dict[str, int] = attrs.Factory(dict)

    @property
    def in_step(self) -> bool:
        """Whether a step has begun and not ended."""
        return self._open

    @property
    def is_left_over(self) -> bool:
        """Whether a step has begun whose backward has ended without it, in a Ctrl-C for instance."""
        return self._open and self._thread == threading.get_ident() and torch._C._current_graph_task_id() == -1

    def begin(self, *, divisor: int | None = None, divides: bool = False, loss_scale: float = 1.0) -> None:
        """Start a step."""
        if self.timetable is not None:
            self.timetable.join()
        self._catch_up()
        self._open = True
        self._thread = threading.get_ident()
        self._tasks.clear()
        self._divisor = self.world_size if divisor is None else divisor
        self._divides = divides
        self._loss_scale = loss_scale
        self._watch = not self.state.is_empty()
        self.state.begin()

    def add(
        self,
        flat: Tensor,
        parameters: Sequence[Tensor],
        spans: tuple[Span, ...],
        used: tuple[bool, ...],
        done: Callable[[], None],
        *,
        plain: bool = False,
    ) -> None:
        """Reduce one bucket, in position, by a ``plain`` mean if the hook was not prepared for its parameters.

        ``done`` is called when it is over, whether it went well or not.
        """
        bucket = Bucket(
            flat=flat,
            parameters=tuple(parameters),
            used=used,
            index=len(self._tasks),
            step=self.step,
            divisor=self._divisor,
            divides=self._divides,
            rank=self.rank,
            world_size=self.world_size,
            loss_scale=self._loss_scale,
            spans=spans,
        )
        own = (SparseMean() if flat.is_sparse else PlainMean()) if plain or flat.is_sparse else None
        hook, wire = (self.hook, self.wire) if own is None else (own, None)
        # What is sparse has another size in each step, the same on all ranks by construction.
        position = Position("step", (self.step, self._abandoned), bucket.index, compared=not flat.is_sparse)
        task = self._task(hook, bucket, wire, position, done, watch=self._watch)
        size = flat._values().nbytes + flat._indices().nbytes if flat.is_sparse else flat.nbytes
        self.driver.meter.step.logical_bytes += 2 * (self.world_size - 1) / self.world_size * size
        self._tasks.append(task)
        self.driver.submit(task)

    def _task(
        self,
        hook: Hook,
        bucket: Bucket,
        wire: torch.dtype | None,
        position: Position,
        done: Callable[[], None] = lambda: None,
        *,
        watch: bool = False,
    ) -> Task:
        return Task(
            hook,
            bucket,
            world=self.world_size,
            wire=wire,
            scratch=self._scratch,
            meter=self.driver.meter,
            watch=watch,
            position=position,
            done=done,
        )

    def _next_round(self, topic: str, group: Subgroup | None) -> tuple[str, int]:
        """The name of what ranks of ``group`` do together between buckets of a step, and how often they have."""
        name = topic if group is None else f"{topic} among {', '.join(map(str, group.ranks))} ({group.key})"
        self._rounds[name] = self._rounds.get(name, 0) + 1
        return name, self._rounds[name]

    def end(self, *, linger: bool = False) -> HookError | None:
        """Wait for every bucket; keep what the step remembered, or say what went wrong with it, here or on a peer.

        ``linger``: do not wait for the peers' word, because they wait for something else of this rank first.
        """
        self.driver.wait()
        figures = self.driver.meter.take()
        tasks, self._tasks = self._tasks, []
        if tasks and self.driver.failure is None and self.driver.confirms and self.world_size > 1:
            self._confirm(tasks, linger=linger)
        self._open = False
        if self.driver.failure is not None:
            self.state.rollback()
            return to_raise(self.driver.failure)
        finite = torch.stack([task.bucket.finite for task in tasks]).all() if tasks and self._watch else True
        self.state.commit(finite)
        self.stats.end_step(figures)
        self.step += 1
        return None if self.timetable is None else self._call(lambda step: self._record(step, linger=linger))

    def _record(self, step: int, *, linger: bool) -> None:
        assert self.timetable is not None
        self.timetable.record(step)
        if linger:
            self.timetable.run_due_in_background()

    def after_step(self) -> HookError | None:
        """Call what the hook wants after a step: its averages are in the parameters' ``.grad``."""
        return next(filter(None, [self._call(function) for function in self.callbacks.after_step]), None)

    def _call(self, function: Callable[[int], None]) -> HookError | None:
        return call_after(function, self.step - 1, type(self.hook).__name__, self.rank)

    def _confirm(self, tasks: list[Task], *, linger: bool) -> None:
        """Hear from every rank that its step ended well, in a round of one element.

        A rank may fail after its last collective, when its peers need nothing more of it. Without this they would go
        on, a step ahead, and meet in different collectives. The figures leave it out.

        A step that an averager makes local asks only those who met in it; the others hear at the next average.
        """
        met = {group for task in tasks for group in task.groups}
        local = self.timetable is not None and None not in met
        for group in sorted(filter(None, met), key=lambda group: group.key) if local else [None]:
            self._submit_sum(torch.zeros(1), group)
        self._lingering = True
        if linger:
            self.driver.end_round()
        else:
            self._catch_up()

    def _catch_up(self) -> None:
        if self._lingering:
            self._lingering = False
            self.driver.wait()
            self.driver.meter.take()

    def abandon(self) -> None:
        """Forget a step that backward did not finish, after what was begun has ended.

        Its peers may have finished theirs, so that what it asks for from now on is compared again.
        """
        self._abandoned += 1
        self.driver.wait()
        self.driver.meter.take()
        self._tasks.clear()
        self.state.rollback()
        self._open = False

    def sum(self, flat: Tensor) -> Tensor:
        """The sum of one short 1-D tensor per rank, in position, in a round of its own.

        A group that has failed leaves it as it is; the step that follows says so.
        """
        self._catch_up()
        self._submit_sum(flat)
        self.driver.wait()
        return flat

    def _submit_sum(self, flat: Tensor, group: Subgroup | None = None) -> None:
        bucket = self.bucket(flat, (), (), group=group)
        topic, number = self._next_round("sum", group)
        self.driver.submit(self._task(Sum(), bucket, None, Position(topic, (number,), compared=False)))

    def bucket(
        self,
        flat: Tensor,
        parameters: Sequence[Tensor],
        spans: tuple[Span, ...],
        *,
        index: int = 0,
        step: int | None = None,
        group: Subgroup | None = None,
    ) -> Bucket:
        """A bucket outside a step's own; its rank and size are those in ``group``."""
        size = self.world_size if group is None else len(group)
        return Bucket(
            flat=flat,
            parameters=tuple(parameters),
            used=(True,) * len(parameters),
            index=index,
            step=self.step if step is None else step,
            divisor=size,
            rank=self.rank if group is None else group.ranks.index(self.rank),
            world_size=size,
            group=group,
            spans=spans,
        )

    def aside(
        self,
        hook: Hook,
        buckets: Iterable[Bucket],
        group: Subgroup | None,
        *,
        topic: str = "average",
        flag: Tensor | None = None,
        counted: bool = True,
    ) -> HookError | None:
        """Reduce buckets of ``group`` with another hook, in a round between steps; return what went wrong in it.

        ``topic`` tells apart what differs from round to round. ``flag``, one element, is summed over the group in the
        confirming round. Its figures count for the step before, if they are to be ``counted``.
        """
        self._catch_up()
        watch = not self.state.is_empty()
        topic, number = self._next_round(topic, group)
        for bucket in buckets:
            position = Position(topic, (number,), bucket.index)
            self.driver.submit(self._task(hook, bucket, self.wire, position, watch=watch))
        self.driver.wait()
        figures = self.driver.meter.take()
        if counted:
            self.stats.add(figures)
            self.stats.last.add(figures)
        if self.driver.failure is None and self.world_size > 1 and (self.driver.confirms or flag is not None):
            self._submit_sum(torch.zeros(1) if flag is None else flag, group)
            self.driver.wait()
            self.driver.meter.take()
        return None if self.driver.failure is None else to_raise(self.driver.failure)
