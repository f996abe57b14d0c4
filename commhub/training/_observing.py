"""What observes a registration lives as long as its model, and keeps it alive no longer."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

    class Told(Protocol):
        """Who is told of something, such as ``Observers``."""

        def add(self, one: Any) -> None:
            """Tell this one too."""

        def remove(self, one: Any) -> None:
            """Tell this one nothing more."""

        def everyone(self) -> list[Any]:
            """Those who are told."""


KEPT = "_commhub_observers"
"""The attribute of a module under which its observers are kept."""


class _Kept(list[Any]):
    """Copies and pickles of a module go without them."""

    def __reduce_ex__(self, _protocol: object) -> tuple[Any, ...]:
        return list, ()


def observe(module: nn.Module, observers: Told, observer: object) -> Callable[[], None]:
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

    def undo() -> None:
        told, one = to_observers(), to_observer()
        if told is not None and one is not None:
            end(to_module(), told, one)

    return undo


def end_all(module: nn.Module | None, observers: Told) -> None:
    """End it for all of them."""
    for observer in observers.everyone():
        end(module, observers, observer)


def end(module: nn.Module | None, observers: Told, observer: object) -> None:
    """End it for one of them."""
    observers.remove(observer)
    kept = None if module is None else module.__dict__.get(KEPT)
    if isinstance(kept, _Kept) and observer in kept:
        kept.remove(observer)
