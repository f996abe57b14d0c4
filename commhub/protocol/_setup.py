"""What a hook is given before the first step: the model's shape, its ranks, and memory to allocate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import attrs

from commhub._errors import HookOptionError, HookOptionTypeError
from commhub._printable import shown

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from ._collectives import Subgroup
    from ._hook import Averager
    from ._state import State


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
        wire: the dtype that ``register(wire=)`` asks for, if any: that of each payload for which the hook names none.
            ``None`` for a hook inside another one.
        scatters: whether ``reduce_scatter`` is called and not ``reduce``. Shapes are then (p, rows of a shard with
            their padding, ...), strides those of such a tensor by itself, and the parameters this rank's shards.
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
    wire: torch.dtype | None = None
    scatters: bool = False
    unused: bool = False
    optimizers: tuple[torch.optim.Optimizer, ...] = ()
    scaler: Any = None
    state: State
    _connect: Callable[[Sequence[Sequence[int]]], Sequence[Subgroup]]
    _after_step: Callable[[Callable[[int], None]], None]
    _at_end: Callable[[Callable[[], None]], object] = lambda _function: None
    _settle: Callable[[Callable[[bool], None]], object] = lambda _function: None
    _average: Callable[[tuple[Averager, Setup]], object] = lambda _pair: None
    _agree: Callable[[str, Callable[[], str], str], object] = lambda _what, _value, _here: None
    _ranks: tuple[int, ...] | None = None

    def partition(self, groups: Sequence[Sequence[int]]) -> Subgroup | None:
        """Make communicators for disjoint groups of ranks and return the one that holds this rank, if any.

        Every rank must ask for the same partition, here in ``prepare`` and nowhere else.

        Raises:
            HookOptionError: if a rank stands twice or is out of range.
        """
        if not isinstance(groups, Sequence) or not all(isinstance(one, Sequence | range) for one in groups):
            raise HookOptionTypeError(f"partition({shown(groups)}): give a list of lists of ranks.")
        flat = [rank for group in groups for rank in group]
        if (
            not all(isinstance(rank, int) for rank in flat)
            or len(set(flat)) != len(flat)
            or not all(0 <= rank < self.world_size for rank in flat)
        ):
            raise HookOptionError(
                f"partition({shown(groups)}): each rank from 0 to {self.world_size - 1} stands at most once."
            )
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

    def settle(self, function: Callable[[bool], None]) -> None:
        """Call ``function(happened)`` once it is settled what became of a step that did not end well on this rank.

        Where ``happened`` is true, another rank has heard from all that the step ended well, and it counts everywhere.
        Otherwise it counts nowhere, and what ``reduce`` has changed in it outside of the bucket and ``state`` is put
        back there, as ``state`` is. The hook does nothing else meanwhile, and no backward is under way. A step that
        ended well calls ``after_step`` instead.
        """
        self._settle(function)

    def average(self, averager: Averager) -> None:
        """Prepare ``averager`` and have the model's parameters averaged on its timetable.

        It runs after the optimizers' steps. One averager serves a registration. The setup that it is given has the
        parameters' own dtypes, where gradients come in others.
        """
        setup = attrs.evolve(self, dtypes=tuple(p.dtype for p in self.parameters)) if self.parameters else self
        self._average((averager, setup))
        prepare = getattr(averager, "prepare", None)
        if prepare is not None:
            prepare(setup)

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
        """The setup of a hook inside another one: the same, with a memory of its own and no say on ``wire=``."""
        return attrs.evolve(self, state=self.state.inner(name), wire=None)
