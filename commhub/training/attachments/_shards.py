"""The attachment to a model that is sharded by FSDP2, between its replicas: each unit's reduced shards are a bucket.

FSDP reads the buffer when its all-reduce hook has returned, so that on the host a bucket is waited for. Nothing is
raised into FSDP: a step that failed is completed with what is in the buffers, and the error is raised when FSDP has
ended its backward, on the ranks of all shards.
"""

from __future__ import annotations

import logging
import weakref
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from commhub._errors import HookError, RegistrationError, described
from commhub.training._elsewhere import Elsewhere

from ._cut import cut
from ._ddp import SLOT
from ._fsdp import at_end_of_backward
from ._uncompiled import queue, uncompiled

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor, nn

    from commhub.training._session import Session
    from commhub.training._trained import Named
    from commhub.training.steps._engine import Engine

    from ._cut import Cut
    from ._fsdp import Shard, Unit

logger = logging.getLogger("commhub")


class Shards:
    """Feeds an engine with what FSDP has reduced over the shards.

    Args:
        root: the model.
        units: its units.

    Attributes:
        owner: the registration, if there is one.
        after: as in ``Attachment``.
    """

    def __init__(self, root: nn.Module, units: Sequence[Unit]) -> None:
        self.owner: Any = None
        self.session: Session | None = None
        self.after: weakref.WeakMethod[Callable[[], None]] | None = None
        self._root, self._units = weakref.ref(root), tuple(units)
        self._engine: Engine | None = None
        self._leave: list[Callable[[], None]] = []
        self._prepared: frozenset[str] = frozenset()
        self._parts: dict[int, list[tuple[Shard, bool]]] = {}
        self._cuts: dict[tuple[Any, ...], list[Cut]] = {}
        self._kept: dict[int, tuple[list[str], Tensor]] = {}
        self._error: BaseException | None = None
        self._came = False
        self._held_back: list[Shard] = []

    @classmethod
    def on(cls, root: nn.Module) -> Shards | None:
        """What is attached to the model, if anything is."""
        found = root.__dict__.get(SLOT)
        return found if isinstance(found, cls) else None

    def parameters(self) -> tuple[Named, ...]:
        """This rank's shards of what is trained now, without those that have no elements."""
        return trained(self._units)

    def attach(self, session: Session, owner: object) -> None:
        """Feed this session from the next step on."""
        self.owner, self.session, self._engine = owner, session, session.engine
        self._prepared = frozenset(name for name, _ in session.target.parameters)
        self._cuts.clear()
        root = self._root()
        if not self._leave and root is not None:
            root.__dict__[SLOT] = self
            for number, unit in enumerate(self._units):
                self._leave.append(unit.enter(_weakly(self._note, number), _weakly(self._reduce, number)))
            self._leave.append(at_end_of_backward(root, weakref.WeakMethod(self._after_backward)))
            handle = root.register_forward_pre_hook(uncompiled(_weakly(self._before_forward)))
            self._leave.append(handle.remove)

    def detach(self) -> bool:
        """Nothing comes any more; FSDP calls what it called before."""
        self.owner = self.after = None
        while self._leave:
            self._leave.pop()()
        root = self._root()
        if root is not None:
            root.__dict__.pop(SLOT, None)
        if self._kept:
            logger.warning("gradients that set_requires_all_reduce(False) has held back are dropped with the hook.")
        self._kept.clear()
        return False

    def _before_forward(self, *_: Any) -> None:
        engine = self._engine
        if engine is None or torch._C._current_graph_task_id() != -1:
            return
        if engine.is_left_over:  # its backward ended in an exception
            engine.abandon()
            engine.settle()
        if self._came:
            self._error, self._came = None, False
            for left in (self._kept, self._parts, self._held_back):
                left.clear()

    def _note(self, number: int) -> None:
        """Take down which shards the unit's buffer is going to hold."""
        self._parts[number] = self._units[number].takes_part()

    def _reduce(self, number: int, buffer: Tensor) -> None:
        """Average one unit's buffer; what goes wrong in the core itself is raised after backward as well."""
        self._came = True
        engine = self._engine
        assert engine is not None
        if self._error is None:
            try:
                self._exchange(number, buffer)
            except Exception as error:  # noqa: BLE001 - it is raised after backward, on the other replicas too
                if not engine.in_step:
                    engine.begin()
                engine.fail(described(error))
            except BaseException as error:  # noqa: BLE001 - a Ctrl-C must not keep FSDP from ending its backward
                self._error = error
                if engine.in_step:
                    engine.abandon()

    def _exchange(self, number: int, buffer: Tensor) -> None:
        unit, engine, session = self._units[number], self._engine, self.session
        assert engine is not None
        assert session is not None
        parts = self._parts.pop(number, [])
        if sum(shard.padded for shard, _ in parts) != buffer.numel():
            raise HookError(
                f"FSDP reduced {buffer.numel()} elements of {unit.name or 'the root'!r}, and which parameters they "
                "belong to cannot be told. Call set_reduce_scatter_unused_params(True) on the model."
            )
        if not self._accumulate(number, [shard.name for shard, _ in parts], buffer, sends=unit.sends):
            return
        if not engine.in_step:
            engine.begin(loss_scale=session.target.loss_scale)
        for one in self._cut(parts):
            flat = one.take(buffer)
            engine.add(flat, one.parameters, one.spans, one.used, plain=one.plain)
            engine.wait()
            one.put_back(flat, buffer)
        if unit.divide_factor is not None:  # it divides the whole, so that between replicas there is a sum
            buffer.mul_(engine.world_size)

    def _accumulate(self, number: int, names: list[str], buffer: Tensor, *, sends: bool) -> bool:
        """Add what was kept of backwards before; whether the sum is to be sent now. If not, it is kept."""
        former = self._kept.pop(number, None)
        if former is not None:
            if former[0] != names:
                raise HookError(
                    f"gradients of {', '.join(sorted(set(former[0]) ^ set(names)))} came in some backwards only "
                    "between two exchanges. Call set_reduce_scatter_unused_params(True) on the model."
                )
            buffer.add_(former[1])
        if not sends:  # FSDP takes what is in the buffer for a gradient that has been averaged
            self._kept[number] = names, buffer.clone()
            buffer.zero_()
            self._held_back += [s for s in self._units[number].shards if s.name in names and s.parameter.grad is None]
        return sends

    def _cut(self, parts: Sequence[tuple[Shard, bool]]) -> list[Cut]:
        key = tuple((id(shard), used) for shard, used in parts)
        if key not in self._cuts:
            self._cuts[key] = list(cut(parts, self._prepared))
        return self._cuts[key]

    def _after_backward(self) -> None:
        try:
            self._end()
        except BaseException as error:  # noqa: BLE001 - raised here it would keep other models from ending theirs

            def tell(error: BaseException = error) -> NoReturn:
                raise error

            queue(tell)

    def _end(self) -> None:
        engine, session, error, came = self._engine, self.session, self._error, self._came
        self._error, self._came = None, False
        self._parts.clear()
        while self._held_back:
            self._held_back.pop().parameter.grad = None
        if engine is None or session is None or not came:
            return
        elsewhere, steps = Elsewhere(session.target), engine.step
        if error is not None or not engine.in_step:  # nothing was to be sent, which may have failed elsewhere
            engine.settle()
            told, _ = elsewhere.told(error)
            if error is not None:
                raise error
            if not told:
                return
            engine.begin()
            engine.fail(told)
        try:
            failure: BaseException | None = engine.end(elsewhere=None if elsewhere.was_told else elsewhere.told)
        except BaseException as interrupted:  # a Ctrl-C
            engine.abandon()
            engine.settle()
            if not elsewhere.was_told:
                elsewhere.told(interrupted)
            raise
        failure = failure or engine.after_step()
        if session.timetable is not None and engine.step > steps:  # the averager was asked, on each rank by itself
            told, _ = Elsewhere(session.target).told(failure)
            if told or failure is not None:
                failed = engine.fail(told if failure is None else described(failure))
                failure = failure or failed
        after = None if self.after is None else self.after()
        if after is not None and failure is None:
            after()
        if failure is not None:
            raise failure

    def __reduce__(self) -> tuple[Any, ...]:
        if self.owner is not None:
            raise RegistrationError(
                f"a model with the hook {self.owner} cannot be copied or pickled. Save model.state_dict(), or call "
                "registration.remove() first."
            )
        return (type(None), ())


def trained(units: Sequence[Unit]) -> tuple[Named, ...]:
    """This rank's shards of what the units train, by name, in the model's order."""
    found: list[Any] = [(s.name, s.local) for unit in units for s in unit.shards if s.is_trained and s.numel]
    return tuple(found)


def _weakly(method: Callable[..., None], *first: Any) -> Callable[..., None]:
    """The method, held by FSDP without keeping its object."""
    reference = weakref.WeakMethod(method)

    def call(*rest: Any) -> None:
        found = reference()
        if found is not None:
            found(*first, *rest)

    return call
