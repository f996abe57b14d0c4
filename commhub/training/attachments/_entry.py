"""What a reducer holds of commhub: a function, and a way to the model's slot that does not keep it alive."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

from commhub._errors import HookError

from ._uncompiled import uncompiled

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor
    from torch.futures import Future


class Entry:
    """The way to a slot's method, which its model alone holds.

    Python sees no circle that goes through C++, and frees none; one would go from the reducer to the slot, to an
    optimizer, to a hook of the user's on that, and to the model.
    """

    def __init__(self, reduce: Callable[[Any], Future[Tensor]]) -> None:
        self._reduce = weakref.WeakMethod(reduce)

    def reduce(self, bucket: Any) -> Future[Tensor]:
        """As the slot does."""
        reduce = self._reduce()
        if reduce is None:
            raise HookError("the model that this hook belongs to is gone.")
        return reduce(bucket)

    def __reduce__(self) -> tuple[Any, ...]:
        return (type(None), ())  # where a model must not be copied, its slot says so


def commhub_slot(state: Entry, bucket: Any) -> Future[Tensor]:
    """What PyTorch keeps; at the top of a module, so that a model whose hook was removed can be pickled."""
    return uncompiled(state.reduce)(bucket)


commhub_slot.__annotations__ = {}  # as text they would not be what PyTorch compares them with
