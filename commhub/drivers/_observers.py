"""Who is told of what hooks ask for and are given: the one seam for traces, loggers and tests."""

from __future__ import annotations

import threading
import traceback
import weakref
from typing import TYPE_CHECKING, Any, Literal

import attrs

from commhub._errors import HookError, described
from commhub.protocol._collectives import Collective

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from commhub.protocol._bucket import Bucket

    Before = Callable[[Bucket, tuple[Collective, ...]], object]
    After = Callable[[Bucket, tuple[Collective, ...], tuple[Tensor, ...]], object]


@attrs.frozen(eq=False)
class Observer:
    """Two functions of a user's; see ``Registration.observe``."""

    before: Before | None
    after: After | None


class Observers:
    """The observers of one registration; false where there are none.

    They are kept alive by somebody else, since whatever holds a driver's tasks must not hold what a user's functions
    refer to.
    """

    def __init__(self) -> None:
        self._all: tuple[weakref.ref[Observer], ...] = ()  # replaced as a whole, because another thread reads it
        self._changing = threading.RLock()  # a reference may die, and say so, while another one is added

    def __bool__(self) -> bool:
        return bool(self._all)

    def add(self, observer: Observer) -> None:
        """Tell this one too."""
        with self._changing:
            self._all = (*self._all, weakref.ref(observer, self._forget))

    def remove(self, observer: Observer) -> None:
        """Tell this one nothing more."""
        self._forget(weakref.ref(observer))

    def everyone(self) -> list[Observer]:
        """Those who are told."""
        return [observer for reference in self._all if (observer := reference()) is not None]

    def asked(self, bucket: Bucket, requests: tuple[Collective, ...]) -> Shown | None:
        """Tell of a stage's collectives, unless the hook has asked for something else; what their results belong to.

        Raises:
            HookError: if an observer raised.
        """
        if not all(isinstance(request, Collective) for request in requests):
            return None
        shown = Shown(self, self._all, bucket, requests)
        shown.tell("before", bucket, requests)
        return shown

    def _forget(self, reference: weakref.ref[Observer]) -> None:
        with self._changing:
            self._all = tuple(one for one in self._all if one is not reference and one != reference)

    def holds(self, reference: weakref.ref[Observer]) -> bool:
        """Whether this one is told."""
        return reference in self._all


@attrs.frozen(eq=False)
class Shown:
    """One stage of a bucket, as it was shown to observers."""

    _observers: Observers
    _told: tuple[weakref.ref[Observer], ...]
    _bucket: Bucket
    _requests: tuple[Collective, ...]

    def answered(self, results: tuple[Tensor, ...]) -> None:
        """Tell of the results that the hook is about to be given.

        Raises:
            HookError: if an observer raised.
        """
        self.tell("after", self._bucket, self._requests, results)

    def tell(self, when: Literal["before", "after"], *about: Any) -> None:
        """Call those who were told of it from the beginning and still observe.

        Raises:
            HookError: if one of them raised.
        """
        failure = self._call(when, about)
        if failure is not None:
            raise failure

    def _call(self, when: str, about: tuple[Any, ...]) -> HookError | None:
        for reference in self._told:
            observer = reference() if self._observers.holds(reference) else None
            function = None if observer is None else getattr(observer, when)
            try:
                if function is not None:
                    function(*about)
            except BaseException as error:  # noqa: BLE001 - as a hook may
                failure = HookError(f"an observer raised {described(error)}")
                # The driver keeps it, and the observer's frames would lead from there to what the observer refers to.
                failure.add_note("".join(traceback.format_exception(error)))
                return failure
        return None
