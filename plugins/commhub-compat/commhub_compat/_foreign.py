"""A function written for ``register_comm_hook`` as a commhub hook: it communicates by itself, and commhub waits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs
import torch
import torch.distributed as dist

import commhub

from ._order import order_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from commhub import Bucket, Exchange, Setup


def foreign(state: Any, hook: Callable[[Any, Any], Any]) -> Foreign:
    """A hook for ``commhub.register(model, ...)`` that runs ``hook(state, bucket)``, a function as PyTorch takes it.

    So it has the registration's steps and times, can be swapped and scheduled, and what it raises is a HookError on
    all ranks. What it sends it sends by itself, with ``torch.distributed``: that is not in ``sent_bytes``, nothing of
    ``wire=`` or an emulated network applies to it, and a rank that waits within it for one that has failed waits as
    long as its process group does. One bucket follows another. What it remembers is not saved.

    It is called in commhub's communication thread, while backward goes on, so that its collectives must not meet those
    of other threads in one process group. A state that is ``None`` or a process group is therefore replaced by a new
    group of the same ranks. Any other state is given as it is: let it hold a group that nothing else uses, such as
    ``torch.distributed.new_group()``.

    Args:
        state: what the function is given first.
        hook: the function. It is given a bucket with PyTorch's methods, and returns a ``torch.futures.Future`` of the
            average, a tensor of as many elements as ``bucket.buffer()``, or of a list with that tensor alone.

    Raises:
        HookOptionError: if ``hook`` cannot be called, or is one of this package, which needs no adapter.

    >>> registration = commhub.register(model, foreign(None, my_hook))  # doctest: +SKIP
    """
    if not callable(hook):
        raise commhub.HookOptionError(f"hook is {type(hook).__name__}; give a function of (state, bucket).")
    name = getattr(hook, "__qualname__", type(hook).__name__)
    if order_of(hook) is not None:
        raise commhub.HookOptionError(
            f"{name} is commhub's already. Register it by its name, or with model.register_comm_hook."
        )
    function = f"{getattr(hook, '__module__', '')}.{name}"
    return Foreign(function=function, group=_group_for(state), called=(hook, state))


def _group_for(state: Any) -> str:
    """Which group the function is given, in words: ranks make one together, or none."""
    if state is not None and not isinstance(state, dist.ProcessGroup):
        return "its state's own"
    try:
        every = state is None or dist.get_world_size(state) == dist.get_world_size()
    except (ValueError, RuntimeError, KeyError) as error:
        return f"none: {error}"
    return "a new one of all ranks" if every else "a new one of its state's ranks"


@attrs.define(eq=False)
class Foreign:
    """What ``foreign`` returns.

    Attributes:
        function: the function's name.
        group: which group it is given. Ranks compare both.
    """

    function: str
    group: str
    _called: tuple[Callable[[Any, Any], Any], Any] = attrs.field(repr=False)  # a state of its own is not compared
    _parameters: int = attrs.field(init=False, repr=False, default=0)
    _seen: int = attrs.field(init=False, repr=False, default=0)
    _given: Any = attrs.field(init=False, repr=False, default=None)

    def prepare(self, setup: Setup) -> None:
        """Make a process group for the function, where it takes one."""
        state = self._called[1]
        self._parameters, self._given = len(setup.names), state
        if not setup.parameters or not (state is None or isinstance(state, dist.ProcessGroup)):
            return
        if state is None and setup.world_size != dist.get_world_size():
            raise commhub.RegistrationError(
                f"{self.function} has no process group, and would average over all {dist.get_world_size()} ranks, not "
                f"over the {setup.world_size} of the model. Give the group as the state."
            )
        group: Any = dist.group.WORLD if state is None else state
        ranks = dist.get_process_group_ranks(group)
        # Made by some ranks alone, a group is named by its ranks and how many groups there are. If it were destroyed,
        # the next would have its name, and find its addresses in the store.
        alone = len(ranks) < dist.get_world_size()
        given = dist.new_group(ranks, backend=dist.get_backend(group), use_local_synchronization=alone)
        self._given = given

        def end() -> None:
            self._given = None
            if not alone:
                dist.destroy_process_group(given)

        setup.at_end(end)

    def reduce(self, bucket: Bucket) -> Exchange:
        """Call the function and wait for its result; yield nothing."""
        yield from ()
        self._seen = len(bucket.parameters) + (0 if bucket.index == 0 else self._seen)
        future = self._called[0](self._given, GradBucket(bucket, is_last=self._seen >= self._parameters))
        if not isinstance(future, torch._C.Future):
            raise commhub.HookError(f"{self.function} returned {type(future).__name__}; return a torch.futures.Future.")
        value: Any = future.wait()
        if isinstance(value, list | tuple) and len(value) == 1:
            value = value[0]
        if not isinstance(value, torch.Tensor) or value.numel() != bucket.flat.numel():
            found = f"{value.numel()} elements" if isinstance(value, torch.Tensor) else type(value).__name__
            raise commhub.HookError(f"{self.function} gave {found} for a bucket of {bucket.flat.numel()}.")
        bucket.flat.copy_(value.reshape(-1))


class GradBucket:
    """A bucket as PyTorch's functions use it: the methods of ``torch.distributed.GradBucket``."""

    def __init__(self, bucket: Bucket, *, is_last: bool) -> None:
        self._bucket, self._buffer, self._is_last = bucket, bucket.flat, is_last

    def buffer(self) -> Tensor:
        """All gradients, 1-D, one after another."""
        return self._buffer

    def set_buffer(self, buffer: Tensor) -> None:
        """Put another tensor in its place."""
        self._buffer = buffer

    def gradients(self) -> list[Tensor]:
        """The gradients, each in its parameter's shape, as parts of the bucket."""
        return list(self._bucket.gradients)

    def parameters(self) -> list[Tensor]:
        """The parameters."""
        return list(self._bucket.parameters)

    def index(self) -> int:
        """Its place within the step."""
        return self._bucket.index

    def is_last(self) -> bool:
        """Whether all parameters have come with it."""
        return self._is_last
