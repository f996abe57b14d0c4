"""What one rank goes on from: its own part of what was saved, or the mean over all former ranks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import attrs
import torch

from commhub._errors import CheckpointError
from commhub.protocol._state import State, Tables, check_same

from ._saved import Saved, key_of

if TYPE_CHECKING:
    from commhub.registry._recipe import Recipe


@contextlib.contextmanager
def _named(where: str) -> Iterator[None]:
    """Errors say in which file it is."""
    try:
        yield
    except CheckpointError as error:
        if not where:
            raise
        raise CheckpointError(f"{where} cannot be loaded: {error}") from error


@attrs.frozen(eq=False)
class Part:
    """What one rank goes on from.

    Attributes:
        hook, step, shared: as saved.
        local: the rank's own tensors, or the mean over all former ranks; ``None`` if what was given has neither.
        other_ranks: whether as many ranks as there are now saved it.
        lacking: why ``local`` is ``None``.
        where: the file or directory that it was read from.
        source: what all ranks must have read alike.
        part: of the model; empty for all of it.
    """

    hook: str
    step: int
    shared: Tables
    local: Tables | None
    other_ranks: bool
    lacking: str
    where: str = ""
    source: str = ""
    part: str = ""


def select(state: Mapping[str, Any] | Sequence[Mapping[str, Any]], rank: int, world_size: int) -> Part:
    """What this rank needs of one or several ranks' dicts, which stay as they are.

    Raises:
        CheckpointError: if one is not a hook's state, or they are not of one moment.
    """
    try:
        dicts = [state] if isinstance(state, Mapping) else list(state)
        saved = [Saved.of(one) for one in dicts]
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(f"this is no hook state: {type(error).__name__}: {error}") from error
    return assemble(sorted(saved, key=lambda one: min(one.local, default=0)), rank, world_size)


def assemble(saved: Iterable[Saved], rank: int, world_size: int) -> Part:
    """What this rank needs of dicts that come one after the other; each is let go of before the next.

    Raises:
        CheckpointError: if there is none, or they are not of one moment.
    """
    first: Saved | None = None
    held: set[int] = set()
    mine: Tables | None = None
    mean = Mean()
    for one in saved:
        first = one if first is None else first
        with _named(one.where):
            for key in ("hook", "step", "world_size", "part"):
                a, b = getattr(first, key), getattr(one, key)
                if a != b:
                    raise CheckpointError(f"the ranks' states do not belong together: {key} is {a!r} and {b!r}.")
            for number in sorted(one.local.keys() - held):
                held.add(number)
                if one.world_size != world_size:
                    mean.add(one.local[number])
                elif number == rank:
                    mine = one.local[number]
        one.local.clear()
        del one
    if first is None:
        raise CheckpointError("no state was given.")
    former = first.world_size
    if former != world_size and len(held) == former:
        mine = mean.result()
    need = f"rank {rank}'s" if former == world_size else f"all {former} former ranks'"
    lacking = (
        f"the state is of {former} ranks and holds {', '.join(map(key_of, sorted(held))) or 'none'}; rank {rank} of "
        f"{world_size} needs {need}. Pass the list of all former ranks' dicts."
    )
    return Part(first.hook, first.step, first.shared, mine, former != world_size, lacking, part=first.part)


class Mean:
    """The mean of several ranks' tables, added up in the order in which they come; what is given stays as it is."""

    def __init__(self) -> None:
        self._sums: Tables = {}
        self._count = 0

    def add(self, tables: Tables) -> None:
        """One rank's more.

        Raises:
            CheckpointError: if they differ from the others in names, shapes or dtypes, or in what has no mean.
        """
        self._count += 1
        if self._count == 1:
            self._sums = {name: dict(table) for name, table in tables.items()}
            return
        check_same(self._sums, tables)
        for name, table in self._sums.items():
            for key, held in table.items():
                other = tables[name][key]
                if not (held.is_floating_point() or held.is_complex()):
                    if not torch.equal(held, other):
                        raise CheckpointError(
                            f"{key!r} of parameter {name!r} is {held.dtype} and differs between the former ranks: "
                            "there is no mean of it. Load on as many ranks as saved."
                        )
                elif self._count == 2:
                    table[key] = held + other
                else:
                    held.add_(other)

    def result(self) -> Tables:
        """The mean; nothing may be added after."""
        for table in self._sums.values():
            for key, held in table.items():
                if held.is_floating_point() or held.is_complex():
                    table[key] = held / 1 if self._count == 1 else held.div_(self._count)
        return self._sums


def of_other_part(saved: Iterable[str], here: str) -> str:
    """Why a rank cannot go on from the state of these parts of a model, which has or is another part."""
    of, works_on = ("; ".join(filter(None, parts)) or "a model that is not sharded" for parts in (saved, [here]))
    return (
        f"the state is of {of}, and this rank works on {works_on}. A hook goes on with the shards that it was saved "
        "with, on any number of replicas."
    )


def check_hook(part: Part, hook: Recipe, of: str = "") -> None:
    """Raise CheckpointError unless the state is of ``hook``, whatever its wire, on the part ``of`` the model."""
    with _named(part.where):
        if part.part != of:
            raise CheckpointError(of_other_part([part.part], of))
        try:
            alike = hook.wrote(part.hook)
        except Exception as error:
            raise CheckpointError(f"the state is damaged: its hook is {part.hook[:80]!r} ({error}).") from error
        if not alike:
            raise CheckpointError(
                f"the state was saved by {part.hook}; this registration runs {hook}. Register that one, or go on "
                "without the state."
            )


def fit(part: Part, state: State) -> Part:
    """The part as this hook takes it; copies nothing, changes nothing.

    Raises:
        CheckpointError: if it is of another model, or does not hold the ranks that are needed.
    """
    local = part.local
    if (local is None or part.other_ranks) and not state.keeps("local"):
        local = {}
    with _named(part.where):
        if local is None:
            raise CheckpointError(part.lacking)
        state.check("local", local)
        state.check("shared", part.shared)
    return attrs.evolve(part, local=local)


def restore(part: Part, state: State) -> None:
    """Put a part that fits back."""
    assert part.local is not None
    with torch.no_grad():
        state.restore("local", part.local)
        state.restore("shared", part.shared)
