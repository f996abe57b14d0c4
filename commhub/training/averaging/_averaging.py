"""Averaging what is trained by an averager's exchange: in place, in chunks, in an order that is the same on every rank.

Parameters are frozen, unfrozen, added and replaced while training goes on, so each average asks the module. What all
ranks of a group have told each other they have travels at once, since its sizes are known to be equal; whether a rank
has something else by now goes along in the round that confirms it, and only then do ranks compare, before anything
else is sent.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import attrs
import torch
from torch import Tensor

from commhub._errors import HookError, described
from commhub.protocol._spans import lay_out
from commhub.training._trained import local, nbytes_of
from commhub.training.steps._between import Between
from commhub.training.steps._callbacks import call_after
from commhub.training.steps._own_hooks import Failure, WholeMean
from commhub.training.steps._text import Entry, SharedText, TextGather, difference

if TYPE_CHECKING:
    import weakref
    from collections.abc import Iterator, Sequence

    from commhub.protocol._bucket import Bucket
    from commhub.protocol._collectives import Subgroup
    from commhub.protocol._hook import Averager, Hook
    from commhub.protocol._setup import Setup
    from commhub.training._trained import Trained
    from commhub.training.steps._between import Round
    from commhub.training.steps._engine import Elsewhere, Engine

logger = logging.getLogger("commhub")

CHUNK = 8 * 2**20
"""Bytes of one bucket of parameters; a parameter that is larger has a bucket to itself."""
AHEAD = 4
"""Buckets in memory at a time."""

Named = tuple[str, Tensor]


@attrs.define(eq=False, kw_only=True)
class Averaging:
    """What an averager works on.

    Attributes:
        averager: whose exchange it is.
        engine: carries the exchange out.
        setup: what the averager's ``prepare`` got.
        trained: the parameters, and the buffers beside them.
        optimizers: whose state may be averaged too.
        elsewhere: as for ``Engine.end``.
    """

    averager: Averager
    engine: weakref.ref[Engine]
    setup: Setup
    trained: Trained
    optimizers: Sequence[torch.optim.Optimizer]
    elsewhere: Elsewhere | None = None
    _prepared: set[Entry] = attrs.field(default=attrs.Factory(lambda self: set(_entries(self.setup)), takes_self=True))
    _said: set[Entry] = attrs.Factory(set)
    _agreed: dict[Subgroup | None, tuple[Entry, ...]] = attrs.Factory(dict)
    _common: dict[Subgroup | None, tuple[frozenset[str], frozenset[str]]] = attrs.Factory(dict)

    @property
    def optimizer_state(self) -> bool:
        """Whether the averager asks for the optimizers' state."""
        return bool(getattr(self.averager, "optimizer_state", False))

    def __call__(self, step: int, group: Subgroup | None, failure: BaseException | None = None) -> BaseException | None:
        """Average everything among ``group``, all ranks where it is ``None``; return what went wrong.

        Args:
            step: the last one.
            group: who meets.
            failure: why this rank cannot.
        """
        engine = self.engine()
        assert engine is not None
        run = _Run(Between(engine, step, group), self.setup.device)
        with torch.no_grad():
            run.between.begin()
            if failure is not None and self.elsewhere is not None:  # all ranks of the mesh give up
                engine.fail(described(failure))
            try:
                mine = self._mine()
                failure = failure or self._known(run, mine) or self._new(run, mine)
                if failure is None and self.optimizer_state:
                    failure = self._optimizer_state(run)
            except BaseException as error:
                run.between.end(error, self.elsewhere)
                raise
            finally:
                self.trained.written()
            failure = run.between.end(failure, self.elsewhere)
            return failure or (self._extend(run, mine) if float(run.changed) else None)

    def look(self, _step: int) -> None:
        """See what this step has trained, even if it is frozen again when an average is due."""
        self.trained.look()

    def prepared(self) -> list[Named]:
        """The parameters that the averager itself reduces."""
        every = ((Entry.of("parameter", name, p), p) for name, p in self.trained.parts())
        return [(entry.name, p) for entry, p in every if entry in self._prepared]

    def _mine(self) -> dict[Entry, Tensor]:
        """What this rank has to average, in the model's order."""
        found: dict[Entry, Tensor] = {Entry.of("parameter", name, p): p for name, p in self.trained.parts()}
        if getattr(self.averager, "buffers", False):
            every = ((name, local(b)) for name, b in self.trained.buffers())
            floating = ((name, b) for name, b in every if b.is_floating_point() or b.is_complex())
            found.update((Entry.of("buffer", name, b), b) for name, b in floating)
        return found

    def _known(self, run: _Run, mine: dict[Entry, Tensor]) -> HookError | None:
        """Average what the group's ranks have told one another they have; hear whether one has something else now."""
        agreed = self._agreed.get(run.group)
        if agreed is None:
            return None
        run.changed.fill_(float(set(agreed) != mine.keys()))
        # What this rank has no more is sent as zeros, of the size that the others expect.
        sent = {e: mine[e] if e in mine else torch.zeros(e.shape, dtype=e.dtype, device=run.device) for e in agreed}
        return self._exchange(run, sent, run.changed)

    def _new(self, run: _Run, mine: dict[Entry, Tensor]) -> HookError | None:
        """Where a rank of the group has something else, compare; then average what has come."""
        if not float(run.changed):
            return None
        told = TextGather(map(str, mine))
        failure = run.tell(told)
        if failure is not None:
            return failure
        differing = difference(told.everyone, run.between.ranks)
        if differing:
            return HookError(
                f"{type(self.averager).__name__}, step {run.step}, rank {run.rank}: the ranks do not train the "
                f"same: {differing}. Freeze, unfreeze, add and replace parameters on all ranks alike, between the same "
                "two averages. Until they are alike again, only what they had in common before is averaged."
            )
        former, words = set(self._agreed.get(run.group, ())), {str(entry): entry for entry in mine}
        agreed = self._agreed[run.group] = tuple(words[word] for word in told.everyone[0])
        return self._exchange(run, {e: mine[e] for e in agreed if e not in former})

    def _exchange(self, run: _Run, tensors: dict[Entry, Tensor], flag: Tensor | None = None) -> HookError | None:
        mean = [(e.name, t) for e, t in tensors.items() if e.kind == "parameter" and e not in self._prepared]
        own = [(e.name, t) for e, t in tensors.items() if e in self._prepared]
        buffers = [(e.name, t) for e, t in tensors.items() if e.kind == "buffer"]
        return run.reduce([(self.averager, [own, buffers]), (WholeMean(), [mean])], flag)

    def _extend(self, run: _Run, mine: dict[Entry, Tensor]) -> HookError | None:
        """Have the averager know what has come, now that it is equal on all ranks; else its plain mean goes on."""
        come = {e: t for e, t in mine.items() if e.kind == "parameter" and e not in self._prepared}
        if not run.between.is_whole or come.keys() <= self._said:
            return None
        self._said.update(come)
        names = tuple(e.name for e in come)
        if run.rank == 0:
            logger.info("step %d: %s averaged too from now on, trained only lately", run.step, ", ".join(names))
        run.between.extend(names)
        extend = getattr(self.averager, "extend", None)
        if not callable(extend):
            return None
        self._prepared.update(come)  # also where it fails, so that ranks go on asking for the same collectives
        setup = attrs.evolve(
            self.setup,
            names=names,
            shapes=tuple(e.shape for e in come),
            dtypes=tuple(e.dtype for e in come),
            strides=tuple(span.stride for span in lay_out(names, come.values())),
            parameters=tuple(come.values()),
        )
        return call_after(lambda _: extend(setup), run.step, type(self.averager).__name__, run.rank)

    def _optimizer_state(self, run: _Run) -> HookError | None:
        """Average the tensors that every rank of the group has. A rank whose optimizer never stepped has none yet."""
        found: dict[str, Tensor] = {}
        for name, parameter in self.trained.look():
            for number, optimizer in enumerate(self.optimizers):
                table: dict[str, Any] = optimizer.state.get(parameter, {})
                for key, value in sorted(table.items()):
                    fits = isinstance(value, Tensor) and value.shape == parameter.shape and value.is_floating_point()
                    if fits and key != "step":
                        found[f"{name}:{key}" if number == 0 else f"{name}:{number}:{key}"] = local(value)
        words = {name: f"{name} {list(tensor.shape)} {tensor.dtype}" for name, tensor in found.items()}
        told = SharedText(frozenset(words.values()), self._common.get(run.group))
        failure = run.tell(told, counted=True)
        if failure is not None:
            return failure
        self._common[run.group] = frozenset(words.values()), told.common
        common = [(name, tensor) for name, tensor in found.items() if words[name] in told.common]
        return run.reduce([(self.averager, [common])])


class _Run:
    """One average under way.

    Attributes:
        between, device: as given.
        step, group, rank: of it.
        changed: one element; above zero where a rank of the group has other tensors than it had at the last average.
    """

    def __init__(self, between: Between, device: torch.device) -> None:
        self.between, self.device = between, device
        self.step, self.group, self.rank = between.step, between.group, between.engine.rank
        self.changed = torch.ones(1, device=device)
        self._index = 0

    def tell(self, hook: Hook, *, counted: bool = False) -> HookError | None:
        """Run an exchange of words."""
        return self.between.tell(hook, self.device, topic="words", counted=counted)

    def reduce(
        self, kinds: Sequence[tuple[Hook, Sequence[list[Named]]]], flag: Tensor | None = None
    ) -> HookError | None:
        """Reduce tensors in place, each hook's own kinds of them; sum ``flag`` over the group beside them.

        What the hooks remember counts if all of it is finite.
        """
        rounds: list[tuple[Hook, list[list[Named]]]] = []
        try:
            for hook, tensors in kinds:
                every = [chunk for same in tensors for chunk in chunks(same)]
                rounds += [(hook, every[start : start + AHEAD]) for start in range(0, len(every), AHEAD)]
            if flag is not None and not rounds:
                rounds.append((WholeMean(), []))
            return self.between.reduce(self._rounds(rounds, flag))
        except Exception as error:  # noqa: BLE001 - parameters may be of anybody's making
            return self.tell(Failure("the parameters cannot be averaged", error))

    def _rounds(self, rounds: list[tuple[Hook, list[list[Named]]]], flag: Tensor | None) -> Iterator[Round]:
        """Fill buckets when their round comes, and take the results back when it went well."""
        for number, (hook, some) in enumerate(rounds, start=1):
            filled: list[tuple[Bucket, list[Named]]] = []
            yield hook, self._fill(some, filled), flag if number == len(rounds) else None
            for bucket, chunk in filled:
                for view, (_, tensor) in zip(bucket.gradients, chunk, strict=True):
                    tensor.copy_(view)

    def _fill(self, some: Sequence[list[Named]], filled: list[tuple[Bucket, list[Named]]]) -> Iterator[Bucket]:
        """Buckets with copies of the chunks' tensors, each also noted in ``filled``."""
        for chunk in some:
            names, tensors = [name for name, _ in chunk], [tensor for _, tensor in chunk]
            spans = lay_out(names, tensors)
            flat = torch.empty(sum(span.numel for span in spans), dtype=tensors[0].dtype, device=self.device)
            bucket = self.between.bucket(flat, tensors, spans, index=self._index)
            self._index += 1
            for view, tensor in zip(bucket.gradients, tensors, strict=True):
                view.copy_(tensor)
            filled.append((bucket, chunk))
            yield bucket


def _entries(setup: Setup) -> Iterator[Entry]:
    for name, shape, dtype in zip(setup.names, setup.shapes, setup.dtypes, strict=True):
        yield Entry("parameter", name, tuple(shape), dtype)


def chunks(tensors: Sequence[Named]) -> Iterator[list[Named]]:
    """Parts of ``tensors``: one dtype each, in the given order, up to CHUNK bytes."""
    by_dtype: dict[torch.dtype, list[Named]] = {}
    for name, tensor in tensors:
        by_dtype.setdefault(tensor.dtype, []).append((name, tensor))
    for same in by_dtype.values():
        chunk: list[Named] = []
        size = 0
        for name, tensor in same:
            nbytes = nbytes_of(name, tensor)
            if chunk and size + nbytes > CHUNK:
                yield chunk
                chunk, size = [], 0
            chunk.append((name, tensor))
            size += nbytes
        yield chunk
