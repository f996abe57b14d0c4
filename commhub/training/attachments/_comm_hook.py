"""Functions for DDP's own ``model.register_comm_hook(state, function)`` that pass their buckets on to a model's slot.

Such a function is given a state and a bucket and no model. It looks for the model once, and registers when the
first backward has ended: only then are all ranks at one place, with nothing of the reducer's locked and none of DDP's
own collectives between them. The buckets of this backward wait until then, and are reduced one after another.
"""

from __future__ import annotations

import gc
import logging
import weakref
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch.nn.parallel import DistributedDataParallel
from torch.utils.weak import WeakIdKeyDictionary

from commhub._errors import HookOptionTypeError, RegistrationError
from commhub._printable import shown

from ._ddp import PYTHON_REDUCER
from ._slot import Slot
from ._uncompiled import queue, uncompiled
from ._way_in import PASSES_ON, passing_on, refuse

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

    from torch import Tensor
    from torch.distributed import ProcessGroup

Future = torch.futures.Future

logger = logging.getLogger("commhub")

_models: Any = WeakIdKeyDictionary()
"""By parameter: the DDP models that hold it, as weak references, as far as it was looked for."""
_openings: weakref.WeakKeyDictionary[DistributedDataParallel, Opening] = weakref.WeakKeyDictionary()
"""By model: the buckets of a backward after which a hook is registered."""


def comm_hook(
    begin: Callable[[Any, Any], object], *, alone: Callable[[Any, Any], Any] | None = None
) -> Callable[[Any, Any], Future[Tensor]]:
    """A function for ``model.register_comm_hook(state, function)``, which registers a commhub hook by itself.

    For packages that offer PyTorch's own way to register. The model's first backward with gradients to average calls
    ``begin(model, state)`` when it ends, on every rank; that is to call ``commhub.register(model, ...)``, and gets what
    DDP was given. The buckets of this backward are reduced then, those of later ones as they come. A function of the
    user's own may be given to DDP instead, and call this one.

    What ranks disagree about they learn at the end of that backward, from an error on all of them, and not before
    training. What ``begin`` raises on some ranks, before it registers or after, the others learn there too, in a
    RegistrationError. No rank has a hook then, the gradients are each rank's own, and the next backward tries again.
    Ranks that were given no such function wait for these and cannot be told.

    A hook that is registered before, with ``commhub.register``, runs instead, and ``begin`` is not called.

    Args:
        begin: has the name and the text that the function is to have.
        alone: a function for models of the python reducer, on which no commhub hook can be registered: it is given the
            state and ``(gradient, parameter)`` in a backward that is being compiled, and averages the gradient in
            place. Without one such models get a RegistrationError.

    Returns:
        a function of ``(state, bucket)``, as PyTorch wants it.

    Raises:
        HookOptionTypeError: if ``begin`` cannot be called.

    >>> @commhub.comm_hook
    ... def half(model, process_group):
    ...     commhub.register(model, "fp16", process_group=process_group)
    >>> model.register_comm_hook(None, half)  # doctest: +SKIP
    """
    if not callable(begin):
        raise HookOptionTypeError(f"comm_hook({shown(begin)}): give a function of (model, state).")

    def passing(state: Any, bucket: Any) -> Any:
        if alone is not None and isinstance(bucket, tuple):
            return alone(state, bucket)
        return uncompiled(_pass_on)(passing, begin, state, bucket)

    for name in ("__module__", "__name__", "__qualname__", "__doc__"):
        if (value := getattr(begin, name, None)) is not None:
            setattr(passing, name, value)
    passing.__annotations__ = {}  # as text they would not be what PyTorch compares them with
    setattr(passing, PASSES_ON, True)
    return passing


def _pass_on(function: object, begin: Callable[[Any, Any], object], state: Any, bucket: Any) -> Future[Tensor]:
    if isinstance(bucket, tuple):
        raise RegistrationError(PYTHON_REDUCER)
    in_backward = torch._C._current_graph_task_id() != -1
    found = _models_of(function, state, bucket.parameters())
    try:
        model = _only(found, function)
        if model.static_graph and model.skip_all_reduce_unused_params and Slot.on(model) is None:
            raise RegistrationError(
                "with static_graph and skip_all_reduce_unused_params nobody knows which bucket of the first step is "
                "its last. Call commhub.register(model, ...) before training."
            )
    except RegistrationError as error:
        groups = {one.process_group for one in found}
        del found  # or the error would keep them
        if not in_backward:
            refuse(error, groups)
            raise
        _tell_after_backward(error.with_traceback(None), groups)
        return _as_it_is(bucket)
    slot = Slot.on(model)
    if slot is None and in_backward:
        return Opening.of(model, begin, state, bucket).add(bucket)
    if slot is None:  # a joined rank's: no backward is under way, and the reducer is not the caller
        slot = _begin(model, begin, state)
    return slot.reduce(bucket)


class Opening:
    """The buckets of a backward that wait for a hook to be registered, until it has ended.

    In static_graph's first step all buckets come after backward, and DDP waits for them at once: there the last of
    them is the end. Where buckets come of backwards within this one, as reentrant checkpoints make them, DDP waits for
    all of them at the end of the backward that has brought the last.
    """

    def __init__(self, model: DistributedDataParallel, begin: Callable[[Any, Any], object], state: Any) -> None:
        self._model, self._begin, self._state = weakref.ref(model), begin, state
        self._task: int | None = None
        self._waiting: list[tuple[Any, Future[Tensor]]] = []
        self._is_late = torch._C._current_autograd_node() is None

    @classmethod
    def of(
        cls, model: DistributedDataParallel, begin: Callable[[Any, Any], object], state: Any, bucket: Any
    ) -> Opening:
        """That of the backward under way; one that another backward has left over is forgotten."""
        opening = _openings.get(model)
        if opening is None or not opening._goes_on_with(bucket):
            opening = _openings[model] = cls(model, begin, state)
        return opening

    def _goes_on_with(self, bucket: Any) -> bool:
        """Whether the bucket is of the same backward, or of one within it."""
        return self._task == torch._C._current_graph_task_id() or bucket.index() == len(self._waiting)

    def add(self, bucket: Any) -> Future[Tensor]:
        """Have a bucket wait."""
        device = bucket.buffer().device
        future: Future[Tensor] = Future() if device.type == "cpu" else Future(devices=[device])
        self._waiting.append((bucket, future))
        task, self._task = self._task, torch._C._current_graph_task_id()
        if self._is_late and self._has_all():
            self._open()
        elif not self._is_late and task != self._task:
            queue(self._open)
        return future

    def _has_all(self) -> bool:
        """Whether all parameters have come; of buckets that come late the reducer does not say which is the last.

        Those of a bucket may all be frozen by now. The reducer, which is waiting and keeps most of what it knows locked
        meanwhile, does tell how many it holds.
        """
        model = self._model()
        come = sum(len(bucket.parameters()) for bucket, _ in self._waiting)
        return model is not None and come >= len(model.reducer.get_backward_stats())

    def _open(self) -> None:
        """Register, and reduce what has waited; raise what goes wrong when DDP has ended this backward."""
        model = self._model()
        if model is None or _openings.get(model) is not self:
            return
        within_another = not self._is_late and torch._C._current_autograd_node() is not None
        if within_another and not self._waiting[-1][0].is_last():
            return  # more buckets follow, and DDP does not wait yet
        del _openings[model]
        waiting, self._waiting = self._waiting, []
        known = [p for bucket, _ in waiting for p in bucket.parameters()] if self._is_late else ()
        try:
            slot = _begin(model, self._begin, self._state, known)
            slot.note_used()
            for bucket, future in waiting:
                future.set_result(slot.reduce(bucket, is_late=True).wait())
        except BaseException as error:  # noqa: BLE001 - it is raised again; DDP waits for the futures first
            for bucket, future in waiting:
                if not future.done():
                    future.set_result(bucket.buffer())
            _tell_after_backward(error)


def _begin(
    model: DistributedDataParallel, begin: Callable[[Any, Any], object], state: Any, known: Sequence[Tensor] = ()
) -> Slot:
    try:
        with passing_on(model, known):
            begin(model, state)
            if (slot := Slot.on(model)) is None:
                name = getattr(begin, "__name__", "the function")
                raise RegistrationError(f"{name} has registered no hook on the model.")
    except BaseException:
        Slot.take_back(model)  # this rank may have registered where another could not
        raise
    if torch.distributed.get_rank(model.process_group) == 0:
        logger.info(
            "%s came by register_comm_hook: ranks have compared their hooks in the first backward, not before it. "
            "commhub.register compares them at once.",
            slot.owner,
        )
    return slot


def _models_of(function: object, state: Any, parameters: list[Tensor]) -> list[DistributedDataParallel]:
    """The DDP models whose reducer may have called ``function`` with these parameters."""
    found = _matching(_known(parameters[0]), function, state)
    if len(found) != 1:
        _look(parameters)
        found = _matching(_known(parameters[0]), function, state)
    return found


def _only(found: list[DistributedDataParallel], function: object) -> DistributedDataParallel:
    """The one of them.

    Raises:
        RegistrationError: if it cannot be told.
    """
    if len(found) == 1:
        return found[0]
    name, count = getattr(function, "__name__", "a hook"), len(found)
    del found  # or the error would keep them
    if not count:
        raise RegistrationError(
            f"{name} was given buckets of no DDP model that Python can find (gc.freeze() hides some). Call "
            "commhub.register(model, ...)."
        )
    raise RegistrationError(
        f"{count} DDP models hold the parameters that {name} was given, with the same state. Give each a state of its "
        "own, or call commhub.register(model, ...). Garbage is collected now: if one is left of a former model, go on."
    )


def _known(parameter: Tensor) -> list[DistributedDataParallel]:
    models = [reference() for reference in _models.get(parameter, ())]
    return [model for model in models if model is not None]


def _matching(models: list[DistributedDataParallel], function: object, state: Any) -> list[DistributedDataParallel]:
    """Those that were given this very function and state; else those that were given any, which may call it."""
    hooked = [model for model in models if model._comm_hooks]
    exact = [model for model in hooked if any(h is function and s is state for h, s in model._comm_hooks)]
    return exact or hooked


def _look(parameters: list[Tensor]) -> None:
    """Find the models of these parameters among all objects; it takes some milliseconds."""
    models = [one for one in gc.get_objects() if issubclass(type(one), DistributedDataParallel)]
    for parameter in parameters:
        _models[parameter] = tuple(
            weakref.ref(model)
            for model in models
            if any(parameter is held for held in model.__dict__.get("_module_parameters", ()))
        )


def _tell_after_backward(error: BaseException, groups: Collection[ProcessGroup] | None = None) -> None:
    """Raise ``error`` after DDP's own callback, which is queued with the last bucket.

    ``groups``: those that the model may have, if the other ranks do not know of the error.
    """

    def tell() -> NoReturn:
        if groups is not None:
            assert isinstance(error, RegistrationError)
            refuse(error, groups)
        gc.collect()  # it may come of models that are garbage; while their reducers' hooks run they must not be freed
        raise error

    queue(lambda: queue(tell))


def _as_it_is(bucket: Any) -> Future[Tensor]:
    future: Future[Tensor] = Future()
    future.set_result(bucket.buffer())
    return future
