"""When parameters are averaged: noted as a step's gradients are ready, done after the optimizers have used them.

A loss scaler may skip the optimizer's step on one rank only, so an average that is due cannot wait for that step
alone: the next forward pass, or whatever needs the parameters before it, settles it too. Every rank settles every
average once, in order, whichever of these comes first there.
"""

from __future__ import annotations

import threading
import weakref
from typing import TYPE_CHECKING, Any

import torch

from ._errors import HookError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import nn

    from ._collectives import Subgroup
    from ._protocols import Averager


class Timetable:
    """Asks an averager after each step, and averages when its time has come.

    Args:
        averager: says whether and among whom.
        average: does it, given the step and the group; returns what went wrong.
        world_size: how many ranks make an average one of all.
    """

    def __init__(
        self, averager: Averager, average: Callable[[int, Subgroup | None], HookError | None], world_size: int
    ) -> None:
        self.then: weakref.WeakMethod[Callable[[], None]] | None = None
        self._averager, self._average, self._world_size = averager, average, world_size
        self._optimizers: tuple[torch.optim.Optimizer, ...] = ()
        self._handles: list[Any] = []
        self._last = -1
        self._ended = False
        self._due: tuple[int, Subgroup] | None = None
        self._stepping = 0
        self._awaited: set[int] = set()
        self._even = True
        self._background: threading.Thread | None = None
        self._failure: HookError | None = None

    @property
    def is_open(self) -> bool:
        """Whether a step has ended whose gradients the optimizers may not have used yet."""
        return self._ended

    def watch(self, module: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        """Learn of the optimizers' steps and of the module's forward passes."""
        self._optimizers = tuple(optimizers)
        this = weakref.ref(self)

        def told(name: str) -> Callable[..., None]:
            def tell(subject: object, *_: object) -> None:
                timetable = this()
                if timetable is not None:
                    getattr(timetable, name)(subject)

            hidden: Callable[..., None] = torch.compiler.disable(tell)
            return hidden

        self._handles.append(module.register_forward_pre_hook(told("_forward")))
        for optimizer in self._optimizers:
            self._handles.append(optimizer.register_step_pre_hook(told("_step_begins")))
            self._handles.append(optimizer.register_step_post_hook(told("_step_ends")))

    def note(self, step: int) -> None:
        """A step's gradients are ready."""
        group = self._averager.due(step)
        if group is not None:
            self._due = step, group
        self._last, self._ended, self._even = step, True, False
        self._awaited = {id(optimizer) for optimizer in self._optimizers}

    def settle(self) -> None:
        """Average now if it is due; between steps.

        Raises:
            HookError: what went wrong.
        """
        self.join()
        if not self._ended:
            return
        self._ended = False
        failure = self._run()
        if failure is not None:
            raise failure
        then = None if self.then is None else self.then()
        if then is not None:
            then()

    def settle_in_background(self) -> None:
        """The same for a rank that must not wait here: ``join`` does."""

        def run() -> None:
            self._failure = self._run()

        self.join()
        if self._ended:
            self._ended = False
            self._background = threading.Thread(target=run, name="commhub-average", daemon=True)
            self._background.start()

    def join(self) -> None:
        """Wait for what runs in the background.

        Raises:
            HookError: what went wrong there.
        """
        thread, self._background = self._background, None
        if thread is not None:
            thread.join()
            failure, self._failure = self._failure, None
            if failure is not None:
                raise failure

    def forget(self) -> None:
        """Drop what is due: the parameters that it was for are no longer in place."""
        self.join()
        self._ended, self._due = False, None

    def level(self) -> HookError | None:
        """Average among all ranks, unless the last step ended with that: nothing else averages from here on."""
        try:
            self.join()
        except HookError as error:
            return error
        self._ended = False
        failure = self._run()
        if failure is None and not self._even:
            failure = self._average(self._last, None)
        return failure

    def close(self) -> None:
        """Listen no more."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _run(self) -> HookError | None:
        due, self._due = self._due, None
        if due is None:
            return None
        step, group = due
        failure = self._average(step, group)
        whole = len(group) == self._world_size and not getattr(self._averager, "partial", False)
        self._even = failure is None and step == self._last and whole
        return failure

    # What the hooks on the module and the optimizers call.

    def _forward(self, _module: object) -> None:
        if not self._stepping:  # within an optimizer's step a closure runs forward, and the step has yet to end
            self.settle()

    def _step_begins(self, _optimizer: object) -> None:
        self._stepping += 1

    def _step_ends(self, optimizer: object) -> None:
        self._stepping -= 1
        self._awaited.discard(id(optimizer))
        if not self._awaited:
            self.settle()
