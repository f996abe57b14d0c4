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

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from torch import Tensor

_AMP = "_step_supports_amp_scaling"
_PLAIN = (bool, int, float, complex, str, tuple, type(None))
_watches: weakref.WeakKeyDictionary[torch.optim.Optimizer, Watch] = weakref.WeakKeyDictionary()


class Watch:
    """Watches one optimizer for the hooks that step its parameters early: one watch, however many they are.

    It holds neither the optimizer nor the model.
    """

    finishers: list[weakref.WeakMethod[Any]]
    """What steps parameters with masters in step() itself, given the ones stepped; returns those that it stepped."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.finishers = []
        self._is_scaled = False
        self._optimizer = weakref.ref(optimizer)
        self._users = 0
        self._handles: list[Any] = []
        self._amp_before: bool | None = None
        self._stepped: set[int] = set()
        self._final: dict[int, tuple[int, int]] = {}
        self._settings: dict[int, dict[str, object]] = {}
        self._complete = self._took_part = False
        self._hidden: list[tuple[Tensor, Tensor]] = []
        self._depth = 0
        self._in_closure = False
        self._wrapped: Callable[[], object] | None = None
        self._own: dict[str, object] | None = None
        self._checked = False

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
        if not self._users and not (self._stepped and self._complete):
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
        if optimizer is None or _watches.get(optimizer) is not self:
            return
        del _watches[optimizer]
        self._is_scaled = True
        self._take_scale(optimizer)

    # While backward runs, by the hook.

    def claim(self, stepped: Iterable[tuple[Tensor, int]], left: Iterable[Tensor], *, took_part: bool) -> None:
        """A bucket is reduced.

        Args:
            stepped: those of its parameters that are about to be stepped, with the numbers of their groups.
            left: those that are left to the user's ``step()``.
            took_part: whether this rank's own backward reached any of the bucket's parameters.

        Raises:
            RegistrationError: if they were stepped before and the user has not called ``step()`` since.
        """
        optimizer = self._optimizer()
        assert optimizer is not None
        if self._complete:
            if self._stepped and self._took_part:
                self._forget()
                raise RegistrationError(
                    f"{type(optimizer).__name__}.step() was not called after the last backward. Its update was done "
                    "in that backward already; to accumulate gradients, run all but the last backward under no_sync()."
                )
            self._forget()  # a rank that has joined: nobody calls step() there
        self._took_part = self._took_part or took_part
        self._stepped.difference_update(map(id, left))  # what a backward that ended in an exception may have stepped
        for parameter, group in stepped:
            self._stepped.add(id(parameter))
            if group not in self._settings:
                self._settings[group] = _plain(optimizer.param_groups[group])

    def conclude(self, parameters: Iterable[Tensor]) -> None:
        """Backward has ended, and the gradients of these parameters are what the user sees from now on."""
        if not self._in_closure and self._depth:  # the step() before ended in an exception
            self._depth = 0
            self._restore()
        if self._is_scaled:
            return
        grads = ((id(p), p.grad) for p in parameters)
        self._final = {key: _print(grad) for key, grad in grads if grad is not None and not grad.is_sparse}
        self._complete = True

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
        self._refuse_scaler(optimizer)
        if not self._checked:
            self._own = _own(optimizer)
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
                self._hide(optimizer)
            except BaseException:
                self._depth = 0
                raise
            finally:
                self._in_closure = False
            return loss

        return evaluated

    def _after(self, optimizer: Any, _args: object, _kwargs: object) -> None:
        self._depth -= 1
        if self._depth > 0:
            return
        self._depth, self._wrapped = 0, None
        self._restore()
        self._forget()
        if not self._users:
            self._uninstall()
        elif not self._checked:
            self._check_own(optimizer)

    def _hide(self, optimizer: torch.optim.Optimizer) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self._restore()
        try:
            self._check_gradients(optimizer, parameters)
            self._check_settings(optimizer)
        except RegistrationError:
            self._depth = 0
            self._forget()
            raise
        for finisher in list(self.finishers):
            finish = finisher()
            if finish is not None:
                self._stepped.update(map(id, finish(optimizer, self.stepped)))
        for parameter in parameters:
            if id(parameter) in self._stepped and parameter.grad is not None:
                self._hidden.append((parameter, parameter.grad))
                parameter.grad = None

    def _restore(self) -> None:
        for parameter, gradient in self._hidden:
            parameter.grad = gradient
        self._hidden.clear()

    def _forget(self) -> None:
        self._stepped.clear()
        self._final.clear()
        self._settings.clear()
        self._complete = self._took_part = False

    # What an update in backward cannot know of.

    def _refuse_scaler(self, optimizer: Any) -> None:
        if not self._is_scaled and ("found_inf" in vars(optimizer) or "grad_scale" in vars(optimizer)):
            for name in ("found_inf", "grad_scale"):
                vars(optimizer).pop(name, None)
            self._depth = 0
            self._forget()
            raise RegistrationError(
                f"a loss scaler steps this {type(optimizer).__name__}, whose parameters are updated in backward, with "
                "gradients that are still scaled. Give the scaler to register(..., scaler=scaler): nothing is "
                "updated then before all gradients are known to be finite."
            )

    def _check_gradients(self, optimizer: object, parameters: Iterable[Tensor]) -> None:
        for parameter in parameters:
            final = self._final.get(id(parameter))
            nothing_lost = not self._stepped and parameter.grad is not None  # as in the first step
            if final is None or not (id(parameter) in self._stepped or nothing_lost):
                continue
            if parameter.grad is None or _print(parameter.grad) != final:
                done = (
                    "in backward, which had used them already"
                    if self._stepped
                    else "in backward from the next step on (in this one nothing was updated yet)"
                )
                raise RegistrationError(
                    f"gradients were changed between backward and {type(optimizer).__name__}.step(), but their update "
                    f"runs {done}. Clipping by global norm, unscaling and the like need every gradient first and "
                    "cannot overlap: leave them out, or register the inner hook by itself."
                )

    def _check_settings(self, optimizer: torch.optim.Optimizer) -> None:
        for number, used in self._settings.items():
            now = _plain(optimizer.param_groups[number])
            changed = [key for key in used if now.get(key) != used[key]]
            if changed:
                raise RegistrationError(
                    f"{changed[0]!r} of group {number} of {type(optimizer).__name__} was changed between backward and "
                    "step(), but the update ran in backward, with the former value. Change settings after step()."
                )

    def _check_own(self, optimizer: Any) -> None:
        before, self._own = self._own, None
        now = _own(optimizer)
        changed = [key for key in now if before is not None and now[key] != before.get(key)]
        if changed:
            raise RegistrationError(
                f"{type(optimizer).__name__} keeps {changed[0]} for all its parameters together and changes it in "
                "step(): its update is not one of each parameter, and cannot run bucket by bucket."
            )
        self._checked = True


def _print(tensor: Tensor) -> tuple[int, int]:
    """What changes when the tensor is replaced or written to."""
    return tensor.data_ptr(), tensor._version


def _plain(settings: dict[str, Any]) -> dict[str, object]:
    """What can be compared of a group's settings, the parameters left out."""
    found: dict[str, object] = {k: v for k, v in settings.items() if k != "params" and isinstance(v, _PLAIN)}
    found.update((k, (id(v), v._version)) for k, v in settings.items() if isinstance(v, torch.Tensor))
    return found


def _own(optimizer: Any) -> dict[str, object]:
    """What an optimizer keeps besides its parameters' state; booleans only say that something was looked at once."""
    local = getattr(optimizer, "optim", optimizer)
    found = {f"the attribute {k!r}": v for k, v in _plain(vars(local)).items() if not isinstance(v, bool)}
    for number, group in enumerate(local.param_groups):
        found.update((f"{k!r} of group {number}", v) for k, v in _plain(group).items())
    return found
