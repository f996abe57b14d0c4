"""p ranks in one process, in lock-step: hooks without processes, networks without hardware.

It drives the very generators that a real run drives, one per virtual rank, and carries the collectives out with
plain tensor operations in rank order. Sums are in the payload's dtype and agree with real ranks to rounding.
"""

from __future__ import annotations

import copy
from functools import reduce
from operator import and_
from typing import TYPE_CHECKING, Any, cast

import attrs
import torch
from torch import Tensor

from commhub._errors import HookOptionError, HookOptionTypeError
from commhub.protocol._collectives import AllReduce, ReduceScatter, Subgroup
from commhub.protocol._hook import Hook, can_scatter, is_averager
from commhub.protocol._nesting import Confined, LocalSteps
from commhub.protocol._setup import Setup
from commhub.protocol._state import State
from commhub.protocol._wire import wire_dtype
from commhub.registry._recipe import choose

from ._failure import own_error
from ._job import Scratch
from ._network import Network
from ._plain import check, exchange, taken
from ._stats import Meter
from ._task import Task
from ._virtual import alike, as_before, count, hosts_of, how_many, tensors
from ._virtual_buckets import Parted, Whole, in_buckets

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from commhub.protocol._hook import Averager

    from ._virtual import Gradients

APART = True
"""Whether payloads are spoiled and results in memory of their own: no hook can then live on what it yielded."""


@attrs.frozen(eq=False, repr=False)
class Simulation:
    """What came of it.

    Attributes:
        gradients: per rank, the last step's averaged tensors, or its rows of them where they are sharded; ranks whose
            results are bit-equal share storage.
        sent_bytes: per rank, what it sent in all steps.
        logical_bytes: what a plain all-reduce, or reduce-scatter, of the same gradients would have sent, per rank, in
            all steps.
        seconds: the time all collectives take on ``network``, one after another; 0 without one.
        hooks, states: per rank, the hook and its memory after the last step.
        label: the hook's name, distribution and version.
        steps: how many were run.
    """

    gradients: tuple[tuple[Tensor, ...], ...]
    sent_bytes: tuple[float, ...]
    logical_bytes: float
    seconds: float
    hooks: tuple[Hook, ...]
    states: tuple[State, ...]
    label: str
    steps: int

    def __repr__(self) -> str:
        ran = f"{self.label}: {len(self.hooks)} ranks, {self.steps} steps"
        return f"<Simulation of {ran}, compression {self.compression:.3g}, {self.seconds:.3g} s>"

    @property
    def compression(self) -> float:
        """Logical over sent bytes of rank 0; 1 for a single rank."""
        if self.logical_bytes == self.sent_bytes[0]:
            return 1.0
        return self.logical_bytes / self.sent_bytes[0] if self.sent_bytes[0] else float("inf")


def simulate(
    hook: object,
    gradients: Gradients,
    *,
    steps: int = 1,
    ranks: int | None = None,
    buckets: int = 1,
    hosts: Sequence[int] | None = None,
    network: Network | str | None = None,
    sharded: bool = False,
    **options: Any,
) -> Simulation:
    """Run a hook on p virtual ranks.

    Args:
        hook: a name, hook string, ``HookType`` member or hook object (then each rank gets a copy). Of an averager
            the tensors are the parameters: averaged in the steps in which it is due, left alone in the others.
        gradients: p lists of tensors, one list per rank, used in every step; or a function (rank, step) -> list.
            They are not changed. A tensor's place in the list, ``"0"``, ``"1"``, ..., is its parameter's name.
        steps: how many steps to run.
        ranks: p, needed where ``gradients`` is a function.
        buckets: in how many buckets the tensors travel (of one dtype each).
        hosts: per rank, the number of its host; by default all on one.
        network: a cost model for ``seconds``; a text such as ``"100mbit"`` is its bandwidth.
        sharded: have each rank get its rows of the average alone, by the hook's ``reduce_scatter``.
        options: the hook's options, and ``wire``.

    Raises:
        HookError: what the hook did wrong, with its bucket, step and rank; also when ranks ask for different things.
        HookOptionError: if an argument is not what it should be, or p cannot be told; of the wrong kind, and where a
            hook object cannot be copied, it is a TypeError too.

    >>> a, b = [torch.tensor([1.0, 2.0])], [torch.tensor([3.0, 6.0])]
    >>> simulate("allreduce", [a, b]).gradients[0][0]
    tensor([2., 4.])
    """
    p = how_many(gradients, ranks)
    steps, buckets, network = count("steps", steps, 0), count("buckets", buckets, 1), Network.of(network)
    chosen = choose(hook, options)
    wire = wire_dtype(chosen.reserved.get("wire"))

    def at(rank: int, step: int) -> Sequence[Tensor]:
        return tensors(gradients(rank, step) if callable(gradients) else gradients[rank], rank)

    world = _World(p, wire, network, chosen.label, sharded=sharded)
    first, hooks = at(0, 0), [_make(chosen.make, hook) for _ in range(p)]
    if sharded and not can_scatter(hooks[0]):
        raise HookOptionError(f"{chosen.label} has no reduce_scatter. Leave sharded= out, or give a hook that has one.")
    world.set_up(hooks, first, hosts_of(hosts, p))
    for step in range(steps):
        given = [at(rank, step) for rank in range(p)]
        for rank, mine in enumerate(given):
            alike(given[0], mine, rank)
        as_before(first, given[0], step)
        world.run(step, given, buckets)
    return world.outcome(steps)


def _make(make: Callable[[], Hook], hook: object) -> Hook:
    if isinstance(hook, str):
        return make()
    try:
        return copy.deepcopy(make())
    except (AttributeError, TypeError) as error:
        kind = type(hook).__name__
        raise HookOptionTypeError(
            f"each virtual rank gets a copy of the {kind} object, and it cannot be copied ({error}). Give fields that "
            "prepare sets a default, or pass the hook's name."
        ) from error


class _World:
    def __init__(self, p: int, wire: torch.dtype | None, network: Network | None, label: str, *, sharded: bool) -> None:
        self.way = Parted(p) if sharded else Whole()
        self.plain: type[AllReduce | ReduceScatter] = ReduceScatter if sharded else AllReduce
        self.p, self.wire, self.network, self.label = p, wire, network, label
        self.scratch, self.meters = Scratch(), [Meter() for _ in range(p)]
        self.logical = self.seconds = 0.0
        self.results: list[list[Tensor]] = [[] for _ in range(p)]
        self.partitions = [0] * p
        self.groups: list[set[Subgroup]] = [set() for _ in range(p)]
        self.after: list[Callable[[int], None]] = []

    def set_up(self, hooks: list[Hook], tensors: Sequence[Tensor], hosts: tuple[int, ...]) -> None:
        self.hooks = hooks
        self.names = tuple(str(i) for i in range(len(tensors)))
        self.states = [State(self.names) for _ in hooks]
        spans = self.way.spans(self.names, tensors)
        apart = [self.way.spans([name], [t])[0] for name, t in zip(self.names, tensors, strict=True)]
        for rank, (hook, state) in enumerate(zip(hooks, self.states, strict=True)):
            setup = Setup(
                names=self.names,
                shapes=tuple(span.shape for span in spans),
                dtypes=tuple(t.dtype for t in tensors),
                strides=tuple(span.stride for span in apart),
                scatters=self.plain is ReduceScatter,
                device=tensors[0].device if tensors else torch.device("cpu"),
                rank=rank,
                world_size=self.p,
                hosts=hosts,
                wire=self.wire,
                state=state,
                connect=self._connecting(rank),
                after_step=self.after.append,
            )
            prepare = getattr(hook, "prepare", None)
            if prepare is not None:
                prepare(setup)

    def _connecting(self, rank: int) -> Callable[[Sequence[Sequence[int]]], tuple[Subgroup, ...]]:
        def connect(groups: Sequence[Sequence[int]]) -> tuple[Subgroup, ...]:
            self.partitions[rank] += 1
            made = tuple(Subgroup(tuple(g), self.partitions[rank]) for g in groups)
            self.groups[rank].update(group for group in made if rank in group.ranks)
            return made

        return connect

    def run(self, step: int, gradients: list[Sequence[Tensor]], buckets: int) -> None:
        self.results = []  # those of the step before are not wanted any more
        outs = [[self.way.result(t, rank) for t in mine] for rank, mine in enumerate(gradients)]
        for state in self.states:
            state.begin()
        finite: list[Tensor | bool] = [True] * self.p
        for index, places in enumerate(in_buckets(gradients[0], buckets)):
            tasks = [self._task(rank, gradients[rank], places, index, step) for rank in range(self.p)]
            self._drive(tasks)
            self.logical += self.plain.sent_bytes(tasks[0].bucket.flat.nbytes, self.p)
            for rank, task in enumerate(tasks):
                finite[rank] = task.bucket.finite & finite[rank]
                for place, view in zip(places, self.way.results(task.bucket), strict=True):
                    outs[rank][place].copy_(view)
        if self.plain is ReduceScatter:  # which ranks tell each other
            finite = [reduce(and_, finite)] * self.p
        for state, verdict in zip(self.states, finite, strict=True):
            state.commit(verdict)
        for function in self.after:
            function(step)
        self.results = outs

    def _turn(self, rank: int, step: int) -> tuple[Hook, Subgroup | None]:
        """What reduces a rank's buckets in a step, and among whom: of an averager, nothing when it is not due."""
        hook = self.hooks[rank]
        if not is_averager(hook):
            return hook, None
        averager = cast("Averager", hook)
        group = averager.due(step)
        return (LocalSteps(averager), None) if group is None else (Confined(averager, group), group)

    def _task(self, rank: int, tensors: Sequence[Tensor], places: list[int], index: int, step: int) -> Task:
        hook, group = self._turn(rank, step)
        bucket = self.way.bucket(
            [self.names[i] for i in places],
            [tensors[i].detach() for i in places],
            index=index,
            step=step,
            divisor=self.p if group is None else len(group),
            rank=rank if group is None else group.ranks.index(rank),
            world_size=self.p if group is None else len(group),
            group=group,
        )
        return Task(
            hook,
            bucket,
            world=self.p,
            wire=self.wire,
            scratch=self.scratch,
            meter=self.meters[rank],
            groups=self.groups[rank],
            watch=not self.states[rank].is_empty(),
        )

    def _drive(self, tasks: list[Task]) -> None:
        self._each(tasks, Task.start)
        while not all(task.finished for task in tasks):
            check(self.label, tasks)
            for stage in zip(*(task.jobs for task in tasks), strict=True):
                exchange(stage)
                for rank, job in enumerate(stage):
                    job.apart = APART
                    self.meters[rank].step.sent_bytes += job.sent_bytes
                if self.network is not None and stage[0].p > 1:
                    self.seconds += self.network.seconds(max(job.sent_bytes for job in stage))
            self._each(tasks, lambda task: task.resume([taken(job) for job in task.jobs]))

    def _each(self, tasks: list[Task], action: Callable[[Task], None]) -> None:
        for task in tasks:
            try:
                action(task)
            except Exception as error:
                raise own_error(self.label, task.bucket, error) from error

    def outcome(self, steps: int) -> Simulation:
        first = self.results[0]
        shared = [[a if _same_bits(a, b) else b for a, b in zip(first, mine, strict=True)] for mine in self.results]
        return Simulation(
            gradients=tuple(tuple(mine) for mine in shared),
            sent_bytes=tuple(meter.step.sent_bytes for meter in self.meters),
            logical_bytes=self.logical,
            seconds=self.seconds,
            hooks=tuple(self.hooks),
            states=tuple(self.states),
            label=self.label,
            steps=steps,
        )


def _same_bits(a: Tensor, b: Tensor) -> bool:
    if a is b or a.shape != b.shape:
        return a is b
    return torch.equal(a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8))
