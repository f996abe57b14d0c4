"""Steps and buckets: what lies between gradients that are ready and the driver that averages them.

Knows nothing of DistributedDataParallel; whatever is an ``Attachment`` feeds it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs
import torch
from torch import Tensor

from commhub.drivers._asked import Position
from commhub.drivers._stats import Stats
from commhub.protocol._collectives import AllReduce, ReduceScatter

from ._callbacks import Callbacks, call_after
from ._own_hooks import PlainMean, SparseMean
from ._rounds import Rounds
from ._step import Step

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from commhub._errors import HookError
    from commhub.drivers._driver import Driver
    from commhub.drivers._observers import Observers
    from commhub.drivers._timeline import Timeline
    from commhub.protocol._collectives import Subgroup
    from commhub.protocol._hook import Hook
    from commhub.protocol._spans import Span
    from commhub.protocol._state import State

    from ._averages import Averages

    Elsewhere = Callable[[BaseException | None, Tensor | bool], tuple[str, Tensor | bool]]


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
        averages: of the averager, if the hook brought one.
        rounds: what it does with its driver, for ``Between``.
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
    averages: Averages | None = None
    rounds: Rounds = attrs.field(init=False)
    _under_way: Step | None = attrs.field(init=False, default=None)
    _abandoned: int = 0
    _resumed: int = 0
    _unsettled: Step | None = None
    _buckets: int = 0

    def __attrs_post_init__(self) -> None:
        self.rounds = Rounds(driver=self.driver, rank=self.rank, world_size=self.world_size)

    @property
    def in_step(self) -> bool:
        """Whether a step has begun and not ended."""
        return self._under_way is not None

    @property
    def is_left_over(self) -> bool:
        """Whether a step has begun whose backward has ended without it, in a Ctrl-C for instance."""
        return self._under_way is not None and self._under_way.is_left_over

    @property
    def has_failed(self) -> bool:
        """Whether it refuses further steps."""
        return self.rounds.has_failed

    @property
    def in_doubt(self) -> bool:
        """Whether a step did not end well here, and may have on a peer."""
        return self._unsettled is not None

    def connect(self, groups: Sequence[Sequence[int]]) -> Sequence[Subgroup]:
        """Make communicators among disjoint groups of ranks, for the hook; on all ranks, in one order."""
        return self.rounds.connect(groups)

    # A step: what an attachment calls.

    def begin(self, *, divisor: int | None = None, divides: bool = False, loss_scale: float = 1.0) -> None:
        """Start a step."""
        if self.averages is not None:
            self.averages.join()
        self.rounds.begin(self.step)
        self._under_way = Step(
            divisor=self.world_size if divisor is None else divisor,
            divides=divides,
            loss_scale=loss_scale,
            watch=not self.state.is_empty(),
        )
        self.state.begin()

    def future(self) -> torch.futures.Future[Tensor]:
        """A future for a bucket, to be completed from the ``done`` that ``add`` is given."""
        return self.rounds.future()

    def add(
        self,
        flat: Tensor,
        parameters: Sequence[Tensor],
        spans: tuple[Span, ...],
        used: tuple[bool, ...],
        done: Callable[[], None] = lambda: None,
        *,
        shard: Tensor | None = None,
        divisor: int | None = None,
        plain: bool = False,
        last: bool = False,
    ) -> None:
        """Reduce one bucket, in place, by a ``plain`` mean if the hook was not prepared for its parameters.

        With a ``shard`` it is scattered: the mean of this rank's part is left there. ``divisor`` counts for this bucket
        in place of the step's. ``done`` is called when it is over, however it went. ``last``: no more until ``wait``.
        """
        step = self._under_way
        assert step is not None
        index = len(step.tasks)
        bucket = self.rounds.bucket(flat, parameters, spans, step=self.step, index=index, used=used, shard=shard)
        bucket.divisor = step.divisor if divisor is None else divisor
        bucket.divides, bucket.loss_scale = step.divides, step.loss_scale
        own = (SparseMean() if flat.is_sparse else PlainMean()) if plain or flat.is_sparse else None
        size = flat._values().nbytes + flat._indices().nbytes if flat.is_sparse else flat.nbytes
        task = self.rounds.submit(
            self.hook if own is None else own,
            bucket,
            # What is sparse has another size in each step, the same on all ranks by construction.
            self._position(bucket.index, compared=not flat.is_sparse),
            wire=self.wire if own is None else None,
            watch=step.watch,
            logical_bytes=(AllReduce if shard is None else ReduceScatter).sent_bytes(size, self.world_size),
            last=last,
            done=done,
        )
        step.tasks.append(task)

    def wait(self) -> None:
        """Wait for the buckets so far; more of the step may follow."""
        self.rounds.wait()

    def end(self, *, linger: bool = False, elsewhere: Elsewhere | None = None) -> HookError | None:
        """Wait for every bucket; keep what the step remembered, or say what went wrong with it, here or on a peer.

        Args:
            linger: do not wait for the peers' word, because they wait for something else of this rank first.
            elsewhere: tells ranks that average other parts of the same model what went wrong here, and whether what
                was averaged is finite; returns what went wrong there, as text, and whether all of it is finite.
        """
        step = self._under_way
        assert step is not None
        self._say_what_is_missing(step)
        figures = self.rounds.finish()
        finite = step.finite
        if step.tasks:
            finite = self._confirm(step, finite, linger=linger)
        failure = self.rounds.failure
        told, finite = ("", finite) if elsewhere is None else elsewhere(failure, finite)
        if failure is None and told:
            self.rounds.fail(told, self.step)
            failure = self.rounds.failure
        self._under_way = None
        if failure is not None:
            self.state.rollback()
            self._unsettled = step
            self.settle()
            return failure
        self._unsettled = None
        self.state.commit(finite)
        self.stats.end_step(figures)
        self.step += 1
        averages = self.averages
        if averages is None:
            return None

        def record(step: int) -> None:
            averages.record(step)
            if linger:
                averages.run_due_in_background()

        return self._call([record])

    def _say_what_is_missing(self, step: Step) -> None:
        """Have the ranks compare it where there are fewer buckets than before: others would meet their last word."""
        count = len(step.tasks)
        for index in range(count, self._buckets):
            self.rounds.leave_out(self._position(index), self.step)
        self._buckets = count

    def _position(self, index: int, *, compared: bool = True) -> Position:
        era = (self._resumed, self._abandoned)
        return Position("step", (self._resumed, self.step, self._abandoned), index, compared=compared, era=era)

    @property
    def acts_after_steps(self) -> bool:
        """Whether ``after_step`` has something to do."""
        return bool(self.callbacks.after_step)

    def after_step(self) -> HookError | None:
        """Call what the hook wants after a step: its averages are in the parameters' ``.grad``."""
        return self._call(self.callbacks.after_step)

    def _call(self, functions: Iterable[Callable[[int], None]]) -> HookError | None:
        """Call them all; the first error."""
        about = self.step - 1, type(self.hook).__name__, self.rank
        return next(filter(None, [call_after(function, *about) for function in functions]), None)

    def _confirm(self, step: Step, finite: Tensor | bool, *, linger: bool) -> Tensor | bool:
        """Hear from every rank that its step ended well; and whether what it has is finite, if that may differ.

        A rank may fail after its last collective, when its peers need nothing more of it. Without this they would go
        on, a step ahead, and meet in different collectives. A step that an averager makes local asks only those who met
        in it; the others hear at the next average.
        """
        met = step.met
        local = self.averages is not None and None not in met
        step.asked = not self.has_failed
        groups = sorted(filter(None, met), key=lambda group: group.key) if local else [None]
        if not step.scatters or not isinstance(finite, Tensor):
            self.rounds.confirm(groups, self.step, linger=linger)
            return finite
        infinite = torch.where(finite, 0.0, 1.0).view(1)
        self.rounds.confirm(groups, self.step, flag=infinite, linger=linger)
        return infinite[0] == 0

    def fail(self, text: str) -> HookError | None:
        """Have the step fail, here and on the peers, for what an attachment could not do; return the error."""
        self.rounds.fail(text, self.step)
        return self.rounds.failure

    def abandon(self) -> None:
        """Forget a step that backward did not finish, after what was begun has ended.

        Its peers may have finished theirs, so that what it asks for from now on is compared again. ``settle`` follows
        when no backward is under way.
        """
        self._abandoned += 1
        self._unsettled = self._under_way
        self.rounds.finish()
        self._under_way = None
        self.state.rollback()

    def settle(self, ended: bool | None = None) -> None:
        """Tell the hook what became of a step that did not end well here, if there is one and this is known.

        ``ended``: whether it ended well on any rank, where the ranks have told each other.
        """
        step = self._unsettled
        if step is None or (ended is None and (step.asked or not self.rounds.is_idle)):
            return  # the peers may have heard of all ranks what this one has not
        self._unsettled = None
        self.callbacks.settled(bool(ended))

    def resume(self, step: int) -> None:
        """Count on from a step that was saved. After an earlier one what is asked for is compared again."""
        if step < self.step:  # not at each call, which ranks may make apart, and one of them twice
            self._resumed += 1
        self.step = step

    def sum(self, flat: Tensor, *, counted: bool = True) -> Tensor:
        """The sum of one short 1-D tensor per rank, in place, in a round of its own.

        A group that has failed leaves it as it is; the step that follows says so, and has its figures if ``counted``.
        """
        self.rounds.sum_now(flat, self.step, counted=counted)
        return flat

    def take_over(self, former: Engine) -> None:
        """Go on with what outlives a hook: the figures, what happened, and who observes."""
        self.stats = former.stats
        self.rounds.take_over(former.rounds)

    @property
    def observers(self) -> Observers:
        """Who is told of what hooks ask for."""
        return self.rounds.observers

    @property
    def timeline(self) -> Timeline:
        """What happened in the last steps."""
        return self.rounds.timeline
