"""DDP models whose reducer calls a function that passes its buckets on to a slot, so that they need no other."""

from __future__ import annotations

import contextlib
import weakref
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor
    from torch.nn.parallel import DistributedDataParallel

PASSES_ON = "_commhub_passes_on"
"""The attribute of such a function."""

_passing_on: weakref.WeakKeyDictionary[DistributedDataParallel, Sequence[Tensor]] = weakref.WeakKeyDictionary()
"""What is known of the reducer's parameters, by model, while one is passing on."""


def has_way_in(model: DistributedDataParallel) -> bool:
    """Whether what the user gave to ``register_comm_hook`` passes its buckets on, or does so now."""
    return model in _passing_on or any(hasattr(function, PASSES_ON) for function, _ in model._comm_hooks)


def known_parameters(model: DistributedDataParallel) -> Sequence[Tensor]:
    """Those that the reducer holds, where it cannot be asked because it is waiting for what it has called."""
    return _passing_on.get(model, ())


@contextlib.contextmanager
def passing_on(model: DistributedDataParallel, parameters: Sequence[Tensor] = ()) -> Iterator[None]:
    """Within it the model has a way in, and its reducer, if ``parameters`` are given, is known to hold these."""
    _passing_on[model] = parameters
    try:
        yield
    finally:
        del _passing_on[model]
