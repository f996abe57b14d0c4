"""What a function of PyTorch's asks commhub for, and the function itself, made from that.

An order is a value, so that wrappers can change it before anything is registered.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any, NoReturn

import attrs
import torch.distributed as dist

import commhub

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor
    from torch.futures import Future

    CommHook = Callable[[Any, Any], Future[Tensor]]
    """What ``DistributedDataParallel.register_comm_hook`` takes."""


@attrs.frozen(kw_only=True)
class Order:
    """One registration to be made.

    Attributes:
        hook: a name, or a hook object.
        options: the hook's.
        process_group: as PyTorch's state has it; ``None`` is the model's own.
        wire: the dtype in which payloads travel, ``"fp16"`` or ``"bf16"``.
        optimizer: for hooks that step one.
        registered: is told of the registration.
    """

    hook: Any
    options: Mapping[str, Any] = attrs.field(factory=dict)
    process_group: dist.ProcessGroup | None = None
    wire: str | None = None
    optimizer: Any = None
    registered: Callable[[commhub.Registration], object] = lambda _registration: None

    def register(self, model: object) -> commhub.Registration:
        """Register it; collective."""
        registration = commhub.register(
            model,
            self.hook,
            process_group=self.process_group,
            wire=self.wire,
            optimizer=self.optimizer,
            **self.options,
        )
        self.registered(registration)
        return registration

    @property
    def text(self) -> str:
        """Its hook string, to be an option of another hook.

        Raises:
            HookOptionError: if it has none.
        """
        if not isinstance(self.hook, str):
            raise commhub.HookOptionError(f"{type(self.hook).__name__} cannot stand inside another hook.")
        options = ", ".join(f"{name}={value!r}" for name, value in self.options.items())
        return f"{self.hook}({options})" if options else self.hook


class Refused:
    """In a hook's place: what registers it raises the error on this rank, and tells the others, who wait for it."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    @property
    def reduce(self) -> NoReturn:
        """What a hook is asked for first."""
        raise self._error


def as_comm_hook(
    order: Callable[[Any], Order], name: str = "", *, alone: Callable[[Any, Any], Any] | None = None
) -> CommHook:
    """The function for ``register_comm_hook`` that registers what ``order(state)`` says.

    It has the order's module, text and names; ``name`` is what PyTorch looks at to refuse hooks by, and ``alone``
    averages one gradient where the python reducer calls.
    """

    def begin(model: object, state: Any) -> None:
        order(state).register(model)

    for attribute in ("__module__", "__qualname__", "__doc__"):
        setattr(begin, attribute, getattr(order, attribute))
    begin.__name__ = name or order.__name__
    function = commhub.comm_hook(begin, alone=alone)
    _orders[function] = order
    return function


_orders: weakref.WeakKeyDictionary[CommHook, Callable[[Any], Order]] = weakref.WeakKeyDictionary()


def order_of(function: object) -> Callable[[Any], Order] | None:
    """What the function orders for a state, if it is one of these."""
    try:
        return _orders.get(function)  # type: ignore[call-overload,no-any-return]
    except TypeError:  # nothing that a weak reference can be made to, or a hash
        return None


def group_of(state: Any) -> dist.ProcessGroup | None:
    """The process group that PyTorch's simple hooks have for a state.

    Raises:
        HookOptionError: if it is none.
    """
    if state is None or isinstance(state, dist.ProcessGroup):
        return state
    raise commhub.HookOptionError(
        f"the state is {type(state).__name__}; this hook takes a process group, or None for the model's own."
    )
