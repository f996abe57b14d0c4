"""The attachment to a DDP model, commhub's one entry into it: the function that the reducer calls with each bucket.

PyTorch takes a hook once and for good, so the slot stays on the model, and registering, swapping and removing change
what stands behind it. It raises nothing into the reducer, which would break it for good: a step that failed is
completed with what is in the buckets, and the error is raised from a callback that runs after DDP's own.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor

from commhub._errors import HookError, RegistrationError
from commhub.protocol._spans import Span, lay_out

from ._ddp import SLOT
from ._entry import Entry, commhub_slot
from ._uncompiled import queue, uncompiled
from ._way_in import has_way_in

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch.nn.parallel import DistributedDataParallel

    from commhub.training._session import Session
    from commhub.training._trained import Named
    from commhub.training.steps._engine import Engine

Future = torch.futures.Future


class Slot:
    """The state of one DDP model's hook: which bucket of which step comes next, and who reduces it.

    Attributes:
        owner: the registration, if there is one.
        session: at work; also after the registration was removed, because DDP goes on handing buckets over.
        after: as in ``Attachment``.
    """

    def __init__(self, model: DistributedDataParallel, parameters: Sequence[Named]) -> None:
        self.owner: Any = None
        self.session: Session | None = None
        self.after: weakref.WeakMethod[Callable[[], None]] | None = None
        self._engine: Engine | None = None
        self._model = weakref.ref(model)
        self._name(parameters)
        self._used: set[int] = set()
        self._seen = 0
        self._task: int | None = None
        self._device = parameters[0][1].device
        self._handles: list[Any] = []
        self._flags = model.find_unused_parameters or model.static_graph
        self._error: BaseException | None = None

    @classmethod
    def on(cls, model: DistributedDataParallel) -> Slot | None:
        """The model's slot, if it has one."""
        slot = model.__dict__.get(SLOT)
        return slot if isinstance(slot, cls) else None

    @classmethod
    def install(cls, model: DistributedDataParallel, parameters: Sequence[Named]) -> Slot:
        """The model's slot, made and handed to the reducer where there was none.

        ``parameters`` are those that the reducer holds. They stay the same; their names are the present ones. What
        the reducer calls already may pass its buckets on to the slot; then that stays.
        """
        slot = cls.on(model)
        if slot is not None:
            slot._name(parameters)
            return slot
        slot = cls(model, parameters)
        if not has_way_in(model):
            model.register_comm_hook(Entry(slot.reduce), commhub_slot)
        slot._watch_use(parameters)
        model.__dict__[SLOT] = slot
        return slot

    @classmethod
    def take_back(cls, model: DistributedDataParallel) -> None:
        """Undo ``install``, on this rank alone, where the reducer calls what finds the slot: its session ends too."""
        slot = cls.on(model)
        if slot is None:
            return
        if slot.owner is not None:
            slot.owner._withdraw()
        elif slot.session is not None:
            slot.session.stop()
        for handle in slot._handles:
            handle.remove()
        del model.__dict__[SLOT]

    def _name(self, parameters: Sequence[Named]) -> None:
        self._parameters = tuple(parameters)
        self._names = {id(p): name for name, p in parameters}
        self._layouts: dict[tuple[int, ...], tuple[Span, ...]] = {}

    def parameters(self) -> tuple[Named, ...]:
        """Those that the reducer holds: they stay what they were when the model was wrapped."""
        return self._parameters

    def attach(self, session: Session, owner: object) -> None:
        """Feed this session from the next step on; tell DDP's own log which hook is at work."""
        self.owner, self.session, self._engine = owner, session, session.engine
        model = self._model()
        if model is not None and model.logger is not None:
            model.logger._set_comm_hook_name(str(session))

    def detach(self) -> bool:
        """Nobody owns the model's slot any more; buckets still come."""
        self.owner = self.after = None
        return True

    def _watch_use(self, parameters: Sequence[Named]) -> None:
        """Where backward may leave parameters out, learn which it reached, from hooks of our own."""
        if self._flags:
            used = self._used

            def mark(parameter: Tensor) -> None:
                used.add(id(parameter))

            for _, parameter in parameters:
                frozen = not parameter.requires_grad
                parameter.requires_grad_(True)  # a frozen one takes no hook, and keeps it when it is frozen again
                handle = parameter.register_post_accumulate_grad_hook(uncompiled(mark))
                parameter.requires_grad_(not frozen)
                self._handles.append(handle)

    def note_used(self) -> None:
        """Take what has a gradient for what the backward under way has reached; it was not watched from its start."""
        if self._flags:
            self._used.update(id(p) for _, p in self._parameters if p.grad is not None)

    def reduce(self, grad_bucket: Any, *, is_late: bool = False) -> Future[Tensor]:
        """Start averaging one of the reducer's buckets; end it, too, if ``is_late``, where the caller waits for it.

        What goes wrong in the core itself, a Ctrl-C included, is raised after backward as well.
        """
        if self._error is None:
            try:
                return self._reduce(grad_bucket, is_late=is_late)
            except BaseException as error:
                if torch._C._current_graph_task_id() == -1:
                    raise  # no backward is under way, and the reducer is not the caller
                self._error = error
        if self._engine is not None and self._engine.in_step:
            self._engine.abandon()
        self._call_back(ended=True)
        future: Future[Tensor] = torch.futures.Future()
        future.set_result(grad_bucket.buffer())
        return future

    def _reduce(self, grad_bucket: Any, *, is_late: bool) -> Future[Tensor]:
        engine, model = self._engine, self._model()
        assert engine is not None
        assert model is not None
        in_backward = torch._C._current_autograd_node() is not None and not is_late
        in_graph_task = torch._C._current_graph_task_id() != -1
        joining = model._join_config.enable
        shadow = joining and not in_graph_task
        if engine.in_step and in_backward and grad_bucket.index() == 0:
            engine.abandon()  # an earlier backward ended in an exception
            self._seen = 0
        if not engine.in_step:
            self._begin(engine, model, joining, shadow)
        parameters = grad_bucket.parameters()
        self._seen += len(parameters)
        last = self._seen >= len(self._names)
        buffer = grad_bucket.buffer()
        flat = buffer
        if parameters[0].is_complex() and not buffer.is_complex():  # PyTorch lays complex gradients out as pairs
            flat = torch.view_as_complex(buffer.view(-1, 2))
        future = engine.future()
        used = self._used_flags(parameters, shadow)
        spans = self._layout(parameters)
        engine.add(flat, parameters, spans, used, lambda: future.set_result(buffer), last=last)
        if not in_backward or joining:
            engine.wait()  # nobody drains later, or a joined rank cannot pipeline either
        if in_graph_task:
            self._call_back(last and not in_backward)
        elif last:
            failure = self._end(engine, linger=shadow)
            if failure is not None:
                raise failure
            self._afterwards()
        return future

    def _begin(self, engine: Engine, model: DistributedDataParallel, joining: bool, shadow: bool) -> None:
        self._seen, self._task = 0, None
        divisor = None
        if joining and not model._divide_by_initial_world_size:
            active = torch.tensor([0.0 if shadow else 1.0], device=self._device)
            divisor = max(1, int(engine.sum(active).item()))
        scale = 1.0 if self.session is None else self.session.target.loss_scale
        engine.begin(divisor=divisor, divides=model.batched_grad_copy, loss_scale=scale)

    def _layout(self, parameters: list[Tensor]) -> tuple[Span, ...]:
        key = tuple(map(id, parameters))
        if key not in self._layouts:
            self._layouts[key] = lay_out([self._names[i] for i in key], parameters)
        return self._layouts[key]

    def _used_flags(self, parameters: list[Tensor], shadow: bool) -> tuple[bool, ...]:
        if not self._flags or shadow:
            return (not shadow,) * len(parameters)
        return tuple(id(p) in self._used for p in parameters)

    def _call_back(self, ended: bool) -> None:
        """Have the step ended when this backward has."""
        task = torch._C._current_graph_task_id()
        if task != self._task or ended:
            self._task = task
            reference = weakref.ref(self)

            def after_backward() -> None:
                slot = reference()
                if slot is not None:
                    slot._after_backward()

            queue(after_backward)

    def _after_backward(self) -> None:
        engine, model = self._engine, self._model()
        error, self._error = self._error, None
        if error is not None:
            self._seen, self._task = 0, None
            self._used.clear()
            if engine is not None:
                engine.settle()

            def tell_error() -> NoReturn:
                raise error

            queue(tell_error)
            return
        if engine is None or model is None or not engine.in_step:
            return
        complete = self._seen >= len(self._names) or model.skip_all_reduce_unused_params
        if not complete:
            engine.wait()  # a backward within a backward; more buckets follow
            return
        failure: BaseException | None
        try:
            failure = self._end(engine)
        except BaseException as error:  # noqa: BLE001 - a Ctrl-C, which must not keep DDP from ending its backward
            engine.abandon()
            engine.settle()
            failure = error
        if failure is not None:

            def tell(failure: BaseException = failure) -> NoReturn:
                raise failure

            queue(tell)
        elif self.after is not None or engine.acts_after_steps:
            queue(self._afterwards)

    def _afterwards(self) -> None:
        """What follows a step, after DDP's own callback, which puts the averages where the user reads them."""
        failure = None if self._engine is None else self._engine.after_step()
        after = None if self.after is None else self.after()
        if after is not None:
            after()
        if failure is not None:
            raise failure

    def _end(self, engine: Engine, *, linger: bool = False) -> HookError | None:
        failure = engine.end(linger=linger)
        self._seen, self._task = 0, None
        self._used.clear()
        return failure

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        self._refuse_copy()

    def __reduce__(self) -> tuple[Any, ...]:
        self._refuse_copy()
        return (type(None), ())

    def _refuse_copy(self) -> None:
        if self.owner is not None:
            raise RegistrationError(
                f"a DDP model with the hook {self.owner} cannot be copied or pickled: the copy would train without it. "
                "Copy model.module, save model.state_dict(), or call registration.remove() first."
            )
