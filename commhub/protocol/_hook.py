"""What a hook is: two methods, one of them a generator. Protocols, so that a third party inherits from nothing."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import attrs

from ._collectives import Collective, Subgroup

if TYPE_CHECKING:
    import torch

    from ._bucket import Bucket
    from ._state import State

Request = Collective | tuple[Collective, ...]
Exchange = Generator[Request, Any, None]
"""What ``reduce`` returns: it yields collectives and is sent a tensor for each (a tuple for a tuple)."""


@attrs.define(eq=False, kw_only=True)
class Setup:
    """What ``prepare`` is given, once, at registration, on every rank. All state is allocated there.

    Attributes:
        names: of the parameters whose gradients are averaged, in the model's order: those that DDP was wrapped with,
            or those of a bare module that are trained.
        shapes: theirs.
        dtypes: theirs.
        strides: theirs.
        parameters: the parameters themselves, in that order; none in a simulation, which has gradients only.
        device: where gradients lie.
        rank: of this process in the group that averages.
        world_size: of that group.
        hosts: for each rank, the number of its host, counted from 0 in rank order.
        unused: whether backward may leave parameters out (``find_unused_parameters``, ``static_graph``).
        optimizers: those given to ``register``.
        scaler: the loss scaler given to ``register``, if any.
        state: the hook's memory.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[torch.dtype, ...]
    strides: tuple[tuple[int, ...], ...]
    parameters: tuple[torch.Tensor, ...] = ()
    device: torch.device
    rank: int
    world_size: int
    hosts: tuple[int, ...]
    unused: bool = False
    optimizers: tuple[torch.optim.Optimizer, ...] = ()
    scaler: Any = None
    state: State
    _connect: Callable[[Sequence[Sequence[int]]], Sequence[Subgroup]]
    _after_step: Callable[[Callable[[int], None]], None]
    _at_end: Callable[[Callable[[], None]], object] = lambda _function: None
    _average: Callable[[tuple[Averager, Setup]], object] = lambda _pair: None
    _agree: Callable[[str, Callable[[], str], str], object] = lambda _what, _value, _here: None
    _ranks: tuple[int, ...] | None = None

    def partition(self, groups: Sequence[Sequence[int]]) -> Subgroup | None:
        """Make communicators for disjoint groups of ranks and return the one that holds this rank, if any.

        Every rank must ask for the same partition, here in ``prepare`` and nowhere else.

        Raises:
            ValueError: if a rank stands twice or is out of range.
        """
        flat = [rank for group in groups for rank in group]
        if len(set(flat)) != len(flat) or not all(0 <= rank < self.world_size for rank in flat):
            raise ValueError(f"partition({groups!r}): each rank from 0 to {self.world_size - 1} stands at most once.")
        base = self._ranks
        absolute = [[r if base is None else base[r] for r in sorted(group)] for group in groups]
        mine = self.rank if base is None else base[self.rank]
        return next((group for group in self._connect(absolute) if mine in group.ranks), None)

    def after_step(self, function: Callable[[int], None]) -> None:
        """Call ``function(step)`` after each synchronised step, once the averages are in the parameters' ``.grad``."""
        self._after_step(function)

    def at_end(self, function: Callable[[], None]) -> None:
        """Call ``function()`` once, when this registration of the hook ends: swapped, removed, replaced or failed.

        What ``prepare`` changed outside the hook is put back there. It is not called when the process or the model
        ends without that; what is kept elsewhere must hold the hook weakly.
        """
        self._at_end(function)

    def average(self, averager: Averager) -> None:
        """Prepare ``averager`` and have the model's parameters averaged on its timetable.

        It runs after the optimizers' steps. One averager serves a registration.
        """
        self._average((averager, self))
        prepare = getattr(averager, "prepare", None)
        if prepare is not None:
            prepare(self)

    def agree(self, what: str, value: Callable[[], str], here: str = "") -> None:
        """Have the ranks compare ``value()`` when all are prepared, where there are others.

        For what decides a result's bits and is none of the options. If it is not the same everywhere, registration
        fails on every rank with a HookMismatchError, unless ``verify=False``.

        Args:
            what: it is, as the error names it: ``"the bits of my factors"``.
            value: returns it.
            here: a half-sentence on this rank's own circumstances, and what to do: ``"it computes with ..."``.
        """
        self._agree(what, value, here)

    def within(self, group: Subgroup) -> Setup:
        """The setup of a hook that works inside ``group``: its rank, size and hosts are the group's."""
        return attrs.evolve(
            self,
            rank=group.ranks.index(self.rank if self._ranks is None else self._ranks[self.rank]),
            world_size=len(group),
            hosts=tuple(self.hosts[r if self._ranks is None else self._ranks.index(r)] for r in group.ranks),
            ranks=group.ranks,
        )

    def inner(self, name: str) -> Setup:
        """The setup of a hook inside another one: the same, with a memory of its own."""
        return attrs.evolve(self, state=self.state.inner(name))


@runtime_checkable
class Hook(Protocol):
    """Averages one bucket of gradients over the ranks.

    A hook may also have ``prepare(setup: Setup) -> None``, called once at registration.
    """

    def reduce(self, bucket: Bucket) -> Exchange:
        """Yield the collectives that average ``bucket`` and leave the result in ``bucket.flat``."""
        ...


@runtime_checkable
class Averager(Protocol):
    """Averages parameters now and then: a hook on a timetable. The bucket it is given holds parameters.

    It may also have ``prepare(setup: Setup) -> None``, called once at registration, and two attributes that ask for
    more than the parameters, in buckets of their own: ``buffers`` (floating-point buffers) and ``optimizer_state``
    (the optimizers' tensors that have a parameter's shape; in a bucket they are named ``"parameter:key"``). A third,
    ``partial``, says that an average that is due leaves parameters out; the last one, among all ranks, must not.

    One that remembers parameters has ``begin(parameters: Mapping[str, Tensor]) -> None``, and takes them from there and
    not from ``prepare``: weights are often loaded after registration. It is called, not collectively, with the
    parameters by name that the first synchronised step was computed with, before an optimizer uses its gradients; and
    again in the first step after ``load_state_dict`` of the module or a part of it. It may be called several times.
    Where state of the registration is loaded too, before or after the weights, that state counts and ``begin`` is
    not called.

    Parameters that are trained only later, unfrozen or added, are averaged by a plain mean. One that has
    ``extend(setup: Setup) -> None`` reduces them itself from then on: it is called once for them, as ``prepare`` was
    for the others, when they are equal on all ranks. It makes no subgroups.
    """

    def due(self, step: int) -> Subgroup | None:
        """Among whom to average after ``step`` (from 0), or ``None`` for not now; from ``step`` alone."""
        ...

    def reduce(self, bucket: Bucket) -> Exchange:
        """Yield the collectives that average ``bucket`` and leave the result in ``bucket.flat``.

        Those that name no group run among the ranks that ``due`` said.
        """
        ...


class LocalSteps:
    """What an averager that was registered by itself stands behind: gradients stay each rank's own."""

    def __init__(self, averager: Averager) -> None:
        self.averager = averager

    def prepare(self, setup: Setup) -> None:
        """Put the averager on its timetable."""
        setup.average(self.averager)

    def reduce(self, bucket: Bucket) -> Exchange:  # noqa: ARG002 - the gradient stays as it is
        """Yield nothing."""
        yield from ()


class InnerHook:
    """A hook made by name for use inside another: it works within the subgroup of the bucket it is given.

    ``commhub.create`` returns it. Everything but ``prepare`` and ``reduce`` is the made hook's own.
    """

    def __init__(self, hook: Hook, name: str) -> None:
        self._hook = hook
        self._name = name

    def prepare(self, setup: Setup) -> None:
        """Prepare the hook with a memory of its own."""
        prepare = getattr(self._hook, "prepare", None)
        if prepare is not None:
            prepare(setup.inner(self._name))

    def reduce(self, bucket: Bucket) -> Exchange:
        """The hook's exchange, its collectives confined to ``bucket.group``."""
        bucket.enter()
        exchange = self._hook.reduce(bucket)
        return exchange if bucket.group is None else confine(exchange, bucket.group)

    @property
    def extend(self) -> Callable[[Setup], None] | None:
        """The hook's own ``extend``, with its memory; ``None`` where it has none."""
        own = getattr(self._hook, "extend", None)
        return None if own is None else lambda setup: own(setup.inner(self._name))

    @property
    def made(self) -> tuple[str, Hook]:
        """The name it was made by, and the hook."""
        return self._name, self._hook

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # copying and unpickling ask for these before there is a hook to ask
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self._hook, name)

    def __repr__(self) -> str:
        return repr(self._hook)


def is_averager(hook: object) -> bool:
    """Whether it averages parameters on a timetable, an averager made by name included."""
    return callable(getattr(hook, "due", None))


def confine(exchange: Exchange, group: Subgroup) -> Exchange:
    """The same exchange, with every collective that names no subgroup confined to ``group``."""

    def within(request: Collective) -> Collective:
        confined = isinstance(request, Collective) and request.group is None
        return attrs.evolve(request, group=group) if confined else request

    results: Any = None
    try:
        while True:
            try:
                request = exchange.send(results)
            except StopIteration:
                return
            results = yield tuple(map(within, request)) if isinstance(request, tuple) else within(request)
    finally:
        exchange.close()


@attrs.frozen(eq=False)
class Confined:
    """What reduces buckets within one group, or among all ranks."""

    _whole: Hook
    _group: Subgroup | None

    def reduce(self, bucket: Bucket) -> Exchange:
        """The exchange, its collectives confined to the group."""
        exchange = self._whole.reduce(bucket)
        return exchange if self._group is None else confine(exchange, self._group)
