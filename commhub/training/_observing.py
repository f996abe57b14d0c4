"""What observes a registration lives as long as its model, and keeps it alive no longer."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

    from commhub.drivers._observers import Observer, Observers

KEPT = "_commhub_observers"
"""The attribute of a module under which its observers are kept."""


class _Kept(list[Any]):
    """Copies and pickles of a module go without them."""

    def __reduce_ex__(self, _protocol: object) -> tuple[Any, ...]:
        return list, ()


def observe(module: nn.Module, observers: Observers, observer: Observer) -> Callable[[], None]:
    """Tell ``observer`` as long as ``module`` lives; what ends that, and keeps neither alive.

    An observer may refer to the module, which a reducer in C++ holds with all that it leads to: a circle that goes
    through there is never freed. So the module itself holds the observer, and nothing else does.
    """
    kept = module.__dict__.get(KEPT)
    if not isinstance(kept, _Kept):
        kept = module.__dict__[KEPT] = _Kept()
    kept.append(observer)
    observers.add(observer)
    to_module, to_observers, to_observer = weakref.ref(module), weakref.ref(observers), weakref.ref(observer)

    def end() -> None:
        told, one = to_observers(), to_observer()
        if told is not None and one is not None:
            _end(to_module(), told, one)

    return end


def end_all(module: nn.Module | None, observers: Observers) -> None:
    """End it for all of them."""
    for observer in observers.everyone():
        _end(module, observers, observer)


def _end(module: nn.Module | None, observers: Observers, observer: Observer) -> None:
    observers.remove(observer)
    kept = None if module is None else module.__dict__.get(KEPT)
    if isinstance(kept, _Kept) and observer in kept:
        kept.remove(observer)
