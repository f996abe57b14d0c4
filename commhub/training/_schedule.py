"""Hooks by the step at which each takes over."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from commhub._errors import HookOptionError, HookOptionTypeError, RegistrationError
from commhub._printable import shown
from commhub.protocol._wire import wire_dtype
from commhub.registry._recipe import choose

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from commhub.registry._recipe import Recipe

_LAST = 2**63


def next_one(hook: object, options: Mapping[str, Any]) -> Recipe:
    """A hook that is to follow another one: of ``register``'s own arguments only ``wire`` may be given again.

    Raises:
        CommhubError: as ``choose``.
    """
    chosen = choose(hook, options)
    if strange := sorted(chosen.reserved.keys() - {"wire"}):
        raise HookOptionError(
            f"{strange[0]!r} stays as register() was given it; give wire= and the hook's own options."
        )
    return chosen


class Schedule:
    """Which hook is due when: false when nothing is to come.

    Attributes:
        texts: hook strings by the number of steps after which each takes over.
    """

    def __init__(self) -> None:
        self.texts: dict[int, str] = {}

    @classmethod
    def of(cls, hooks: Mapping[int, object], done: int, check: Callable[[Recipe], object]) -> Schedule:
        """The schedule that a user wrote when ``done`` steps were done. Each hook is made once, to see that it can be.

        ``check`` raises for a hook that could not be registered here.

        Raises:
            HookOptionError, UnknownHookError: for any of the hooks.
            RegistrationError: for a step that has passed, for a hook object, and as ``check``.
        """
        given: Any = getattr(hooks, "items", None)
        if not callable(given):
            raise HookOptionTypeError(f"schedule takes a dict of hooks by step, not {shown(hooks)}.")
        steps = dict(given())
        for step in steps:
            if isinstance(step, bool) or not isinstance(step, int) or not done <= step < _LAST:
                raise RegistrationError(f"schedule: {shown(step, 40)} is no step to come; {done} are done.")
        made = cls()
        for step, hook in sorted(steps.items()):
            if not isinstance(hook, str):
                raise RegistrationError("schedule takes hook strings or HookType members, so that it can be shown.")
            made.texts[step] = str(getattr(hook, "value", hook))
            chosen = next_one(hook, {})
            wire_dtype(chosen.reserved.get("wire"))
            check(chosen)
            chosen.make()
        return made

    def __bool__(self) -> bool:
        return bool(self.texts)

    def due(self, step: int) -> str | None:
        """The hook that is to run when ``step`` steps are done, if one is due."""
        passed = [at for at in self.texts if at <= step]
        return self.texts[max(passed)] if passed else None

    def drop(self, step: int) -> None:
        """Forget what was due when ``step`` steps were done."""
        self.texts = {at: text for at, text in self.texts.items() if at > step}
