"""The attachment to a model that is sharded by FSDP2: what a unit reduces is a bucket, one way or another.

FSDP reads its buffer as soon as it was given back, so that on the host a bucket is waited for. Nothing is raised into
FSDP: a step that failed is completed with what is there, and the error is raised when FSDP has ended its backward, on
the ranks of all shards.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

import torch

from commhub._errors import HookError, RegistrationError, described
from commhub.training._elsewhere import Elsewhere

from ._ddp import SLOT
from ._fsdp_entry import at_end_of_backward, is_backward_unended
from ._uncompiled import queue, uncompiled

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

    from torch import nn

    from commhub.training._session import Session
    from commhub.training._trained import Named
    from commhub.training.steps._engine import Engine

    from ._fsdp import Shard, Unit

_UNENDED = (
    "the last backward of this model ended in an exception, and FSDP ends no other one until it is told: no step would "
    "count, and no error of the hook come out. Call model.reset_iter_state() on the outermost sharded module after "
    "such an exception, on every rank, before the next forward."
)


class Way(Protocol):
    """What of a backward a hook takes over."""

    def parameters(self, units: Sequence[Unit]) -> tuple[Named, ...]:
        """What of the units' parameters is trained now, by name, in the model's order."""
        ...

    def attach(self, prepared: Collection[str]) -> None:
        """A hook begins that was prepared for these."""
        ...

    def enter(self, unit: Unit, before: Callable[[], None], reduce: Callable[..., None]) -> Callable[[], None]:
        """Have FSDP call ``reduce`` for the unit; what puts everything back."""
        ...

    def exchange(
        self, unit: Unit, parts: Sequence[tuple[Shard, bool]], begin: Callable[[], Engine], *tensors: Any
    ) -> None:
        """Do for the unit what ``reduce`` was called for, in a step that ``begin`` begins."""
        ...

    def give_up(self, *tensors: Any) -> None:
        """Complete what ``reduce`` was called for without an exchange."""
        ...

    def end(self) -> None:
        """FSDP has ended its backward."""
        ...

    def forget(self) -> None:
        """A backward was left in its middle."""
        ...

    def leave(self) -> None:
        """The hook is taken away."""
        ...


class Shards:
    """Feeds an engine with what FSDP reduces.

    Args:
        root: the model.
        units: its units.
        way: what of their backward is taken over.

    Attributes:
        owner: the registration, if there is one.
        after: as in ``Attachment``.
    """

    def __init__(self, root: nn.Module, units: Sequence[Unit], way: Way) -> None:
        self.owner: Any = None
        self.session: Session | None = None
        self.after: weakref.WeakMethod[Callable[[], None]] | None = None
        self._root, self._units, self._way = weakref.ref(root), tuple(units), way
        self._engine: Engine | None = None
        self._leave: list[Callable[[], None]] = []
        self._parts: dict[int, list[tuple[Shard, bool]]] = {}
        self._error: BaseException | None = None
        self._came = False

    @classmethod
    def on(cls, root: nn.Module) -> Shards | None:
        """What is attached to the model, if anything is."""
        found = root.__dict__.get(SLOT)
        return found if isinstance(found, cls) else None

    def parameters(self) -> tuple[Named, ...]:
        """What is trained now."""
        return self._way.parameters(self._units)

    def goes(self, way: type[Way]) -> bool:
        """Whether this is what of its backward is taken over."""
        return isinstance(self._way, way)

    def attach(self, session: Session, owner: object) -> None:
        """Feed this session from the next step on."""
        self.owner, self.session, self._engine = owner, session, session.engine
        self._way.attach([name for name, _ in session.target.parameters])
        root = self._root()
        if not self._leave and root is not None:
            root.__dict__[SLOT] = self
            for number, unit in enumerate(self._units):
                self._leave.append(self._way.enter(unit, _weakly(self._note, number), _weakly(self._reduce, number)))
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
        self._way.leave()
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
            self._parts.clear()
            self._way.forget()
        root = self._root()
        if root is not None and is_backward_unended(root):
            raise HookError(_UNENDED)

    def _note(self, number: int) -> None:
        """Take down which shards the unit's buffer is going to hold."""
        self._parts[number] = self._units[number].takes_part()

    def _reduce(self, number: int, *tensors: Any) -> None:
        """Exchange one unit's gradients; what goes wrong in the core itself is raised after backward as well."""
        self._came = True
        engine = self._engine
        assert engine is not None
        if self._error is None:
            try:
                self._exchange(number, tensors)
                return
            except Exception as error:  # noqa: BLE001 - it is raised after backward, on the other ranks too
                if not engine.in_step:
                    engine.begin()
                engine.fail(described(error))
            except BaseException as error:  # noqa: BLE001 - a Ctrl-C must not keep FSDP from ending its backward
                self._error = error
                if engine.in_step:
                    engine.abandon()
        self._way.give_up(*tensors)

    def _exchange(self, number: int, tensors: Sequence[Any]) -> None:
        engine, session = self._engine, self.session
        assert engine is not None
        assert session is not None

        def begin() -> Engine:
            if not engine.in_step:
                engine.begin(loss_scale=session.target.loss_scale)
            return engine

        self._way.exchange(self._units[number], self._parts.pop(number, []), begin, *tensors)

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
        self._way.end()
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


def _weakly(method: Callable[..., None], *first: Any) -> Callable[..., None]:
    """The method, held by FSDP without keeping its object."""
    reference = weakref.WeakMethod(method)

    def call(*rest: Any) -> None:
        found = reference()
        if found is not None:
            found(*first, *rest)

    return call
