"""What stands between an optimizer and the ``step()`` in its user's loop, while some parameters are stepped early.

``step()`` stays where it is and does what is left: the gradients of parameters that were stepped already are hidden
from it. Whatever the user does between backward and ``step()`` that an update in backward could not know of is an
error here: gradients that were changed, settings that were changed, a loss scaler, a ``step()`` left out.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import torch

from commhub import RegistrationError

from ._changes import (
    belongings,
    check_belongings,
    check_gradients,
    check_settings,
    fingerprint,
    refuse_scaler,
    settings,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable

    from torch import Tensor

_AMP = "_step_supports_amp_scaling"
_watches: weakref.WeakKeyDictionary[torch.optim.Optimizer, Watch] = weakref.WeakKeyDictionary()


class Watch:
    """Watches one optimizer for the hooks that step its parameters early: one watch, however many they are.

    It holds neither the optimizer nor the model, and knows parameters by identity.

    Attributes:
        finishers: what steps parameters with masters within ``step()``: weak methods that are given the optimizer and
            the parameters stepped so far, and return the ones they stepped.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.finishers: list[weakref.WeakMethod[Any]] = []
        self._optimizer = weakref.ref(optimizer)
        self._users = 0
        self._is_scaled = False
        self._handles: list[Any] = []
        self._amp_before: bool | None = None
        self._stepped: dict[int, bool] = {}  # and whether this rank took part
        self._final: dict[int, tuple[int, int]] = {}  # gradients at the end of backward
        self._settings: dict[int, dict[str, object]] = {}  # of groups, as used
        self._hidden: list[tuple[Tensor, Tensor]] = []
        self._depth = 0  # of step() within step(), as subclasses call their base's
        self._in_closure = False
        self._wrapped: Callable[[], object] | None = None
        self._before_step: dict[str, object] | None = None
        self._is_checked = False

    @classmethod
    def on(cls, optimizer: torch.optim.Optimizer, *, is_scaled: bool = False) -> Watch:
        """The optimizer's watch, with one more user; ``release`` it. ``is_scaled``: a loss scaler may step it."""
        watch = _watches.get(optimizer)
        if watch is None:
            watch = _watches[optimizer] = cls(optimizer)
            watch._install(optimizer)
        watch._users += 1
        watch._is_scaled = is_scaled
        watch._take_scale(optimizer)
        return watch

    def release(self) -> None:
        """One user less. After the last, nothing stays on the optimizer, once it has had the step that is due."""
        self._users -= 1
        if not self._users and not self._stepped.keys() & self._final.keys():
            self._uninstall()

    def _install(self, optimizer: torch.optim.Optimizer) -> None:
        self._handles = [
            optimizer.register_step_pre_hook(torch.compiler.disable(self._before)),
            optimizer.register_step_post_hook(torch.compiler.disable(self._after)),
        ]
        self._amp_before = vars(optimizer).get(_AMP)

    def _take_scale(self, optimizer: torch.optim.Optimizer) -> None:
        """Be told of a loss scaler: it calls step() with the scale on the optimizer, instead of dividing before."""
        if not self._is_scaled:
            setattr(optimizer, _AMP, True)
        elif self._amp_before is None:
            vars(optimizer).pop(_AMP, None)
        else:
            setattr(optimizer, _AMP, self._amp_before)

    def _uninstall(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._restore()
        optimizer = self._optimizer()
        if optimizer is not None:
            del _watches[optimizer]
            self._is_scaled = True
            self._take_scale(optimizer)

    # While backward runs, by the hook.

    def claim(self, stepped: Collection[tuple[Tensor, int]], left: Collection[Tensor], *, took_part: bool) -> None:
        """A bucket is reduced.

        Args:
            stepped: those of its parameters that are about to be stepped, with the numbers of their groups.
            left: those that are left to the user's ``step()``.
            took_part: whether this rank's own backward reached any of the bucket's parameters.

        Raises:
            RegistrationError: if one was stepped in the backward before, and the user has not called ``step()`` since.
        """
        optimizer = self._optimizer()
        assert optimizer is not None
        for parameter in (*left, *(parameter for parameter, _ in stepped)):
            # Not so after a backward that failed midway, nor on a rank that has joined, where nobody calls step().
            if self._stepped.pop(id(parameter), False) and id(parameter) in self._final:
                self._forget()
                raise RegistrationError(
                    f"{type(optimizer).__name__}.step() was not called after the last backward. Its update was done "
                    "in that backward already; to accumulate gradients, run all but the last backward under no_sync()."
                )
            self._final.pop(id(parameter), None)
        for parameter, group in stepped:
            self._stepped[id(parameter)] = took_part
            self._settings[group] = settings(optimizer.param_groups[group])

    def unclaim(self, parameters: Iterable[Tensor]) -> None:
        """These were not stepped in backward after all."""
        for parameter in parameters:
            self._stepped.pop(id(parameter), None)

    def conclude(self, parameters: Iterable[Tensor]) -> None:
        """Backward has ended, and the gradients of these parameters are what the user sees from now on."""
        if not self._in_closure and self._depth:  # the step() before ended in an exception
            self._depth = 0
            self._restore()
        if not self._is_scaled:
            grads = ((id(p), p.grad) for p in parameters)
            self._final.update((key, fingerprint(g)) for key, g in grads if g is not None and not g.is_sparse)

    @property
    def stepped(self) -> frozenset[int]:
        """The parameters, by identity, that ``step()`` leaves alone when it is called next."""
        return frozenset(self._stepped)

    # The user's step().

    def _before(self, optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        self._depth += 1
        if self._depth > 1 and (closure is None or closure is self._wrapped):
            return None  # a subclass's step() has called its base's
        self._depth = 1
        if not self._users:  # the hook after the step removes itself, which only the last one can
            optimizer._optimizer_step_post_hooks.move_to_end(self._handles[1].id)
        if not self._is_checked:
            self._before_step = belongings(optimizer)
        if closure is None:
            self._hide(optimizer)
            return None
        self._wrapped = wrapped = self._evaluated(optimizer, closure)
        return ((args[0], wrapped, *args[2:]), kwargs) if len(args) > 1 else (args, {**kwargs, "closure": wrapped})

    def _evaluated(self, optimizer: Any, closure: Callable[[], object]) -> Callable[[], object]:
        def evaluated() -> object:
            self._restore()
            self._in_closure = True
            try:
                loss = closure()  # backward runs in here
            except BaseException:
                self._depth = 0
                raise
            finally:
                self._in_closure = False
            self._hide(optimizer)
            return loss

        return evaluated

    def _hide(self, optimizer: torch.optim.Optimizer) -> None:
        """Leave ``step()`` the gradients of what it is to step."""
        self._restore()
        try:
            if not self._is_scaled:
                refuse_scaler(optimizer)
            check_gradients(optimizer, self._final, self._stepped)
            check_settings(optimizer, self._settings)
        except RegistrationError:
            self._depth = 0
            self._forget()
            raise
        for finisher in list(self.finishers):
            finish = finisher()
            if finish is not None:
                self._stepped.update((id(p), True) for p in finish(optimizer, self.stepped))
        for parameter in (p for group in optimizer.param_groups for p in group["params"]):
            if id(parameter) in self._stepped and parameter.grad is not None:
                self._hidden.append((parameter, parameter.grad))
                parameter.grad = None

    def _after(self, optimizer: Any, _args: object, _kwargs: object) -> None:
        self._depth -= 1
        if self._depth > 0:
            return
        self._depth, self._wrapped = 0, None
        self._restore()
        self._forget()
        if not self._users:
            self._uninstall()
        elif self._before_step is not None:
            before, self._before_step = self._before_step, None
            check_belongings(optimizer, before)
            self._is_checked = True

    def _restore(self) -> None:
        for parameter, gradient in self._hidden:
            parameter.grad = gradient
        self._hidden.clear()

    def _forget(self) -> None:
        self._stepped.clear()
        self._final.clear()
        self._settings.clear()
