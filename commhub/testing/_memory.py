"""What a hook allocates in a step: dispatch modes that look at every operation, and a hook that runs under one.

What a compiled kernel allocates inside, they do not see.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from commhub import Bucket, Exchange, Hook, Setup

Mode = TypeVar("Mode", bound=TorchDispatchMode)


class Largest(TorchDispatchMode):
    """The largest tensor that an operation made and that shares no memory with what it was given.

    Attributes:
        nbytes: its size; 0 if there was none.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch has no types there
        self.nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run ``func``, and look at what it made."""
        out = func(*args, **(kwargs or {}))
        self.nbytes = max([self.nbytes, *(storage.nbytes() for storage in _made(out, (args, kwargs)))])
        return out


class Living(TorchDispatchMode):
    """How many bytes that operations made were alive at once, at most.

    Attributes:
        peak: this number.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch has no types there
        self.peak = 0
        self._living: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run ``func``, and count what it made and what is still there."""
        out = func(*args, **(kwargs or {}))
        for storage in _made(out, (args, kwargs)):
            self._living[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self._living = {key: entry for key, entry in self._living.items() if not entry[0].expired()}
        self.peak = max(self.peak, sum(nbytes for _, nbytes in self._living.values()))
        return out


class Watched(Generic[Mode]):
    """A hook whose own work in a step, between its collectives, is done under a mode.

    Args:
        hook: to be watched.
        mode: makes the mode, once per rank.
        since: the first step that counts; -1 counts ``prepare`` too.

    Attributes:
        seen: the mode.
    """

    seen: Mode

    def __init__(self, hook: Hook, mode: Callable[[], Mode], since: int = 0) -> None:
        self.hook, self._mode, self._since = hook, mode, since

    def prepare(self, setup: Setup) -> None:
        """As the hook does."""
        self.seen = self._mode()
        prepare = getattr(self.hook, "prepare", None)
        if prepare is None:
            return
        with self.seen if self._since < 0 else nullcontext():
            prepare(setup)

    def reduce(self, bucket: Bucket) -> Exchange:
        """As the hook does."""
        if bucket.step < self._since:
            yield from self.hook.reduce(bucket)
            return
        exchange: Any = self.hook.reduce(bucket)
        value: Any = None
        while True:
            with self.seen:
                try:
                    request = exchange.send(value)
                except StopIteration:
                    return
            value = yield request


def _made(out: Any, given: Any) -> Iterator[torch.UntypedStorage]:
    """The storages of ``out`` that are not among those of ``given``."""
    before = {_address(x) for x in tree_leaves(given) if isinstance(x, torch.Tensor)}
    for one in tree_leaves(out):
        if isinstance(one, torch.Tensor) and _address(one) not in before:
            yield one.untyped_storage()


def _address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
