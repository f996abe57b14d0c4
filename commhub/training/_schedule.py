"""Hooks by the step at which each takes over."""

from __future__ import annotations

from typing import TYPE_CHECKING

from commhub._errors import RegistrationError
from commhub.registry._recipe import choose

if TYPE_CHECKING:
    from collections.abc import Mapping


class Schedule:
    """Which hook is due when: false when nothing is to come.

    Attributes:
        texts: hook strings by the number of steps after which each takes over.
    """

    def __init__(self) -> None:
        self.texts: dict[int, str] = {}

    @classmethod
    def of(cls, hooks: Mapping[int, object], done: int) -> Schedule:
        """The schedule that a user wrote when ``done`` steps were done. Each hook is made once, to see that it can be.

        Raises:
            HookOptionError, UnknownHookError: for any of the hooks.
            RegistrationError: for a step that has passed, and for a hook object.
        """
        made = cls()
        for step, hook in sorted(hooks.items()):
            if isinstance(step, bool) or not isinstance(step, int) or step < done:
                raise RegistrationError(f"schedule: {step!r} is no step to come; {done} are done.")
            if not isinstance(hook, str):
                raise RegistrationError("schedule takes hook strings or HookType members, so that it can be shown.")
            made.texts[step] = str(getattr(hook, "value", hook))
            choose(hook, {}).make()
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
