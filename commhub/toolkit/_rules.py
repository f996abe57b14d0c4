"""Settings for single parameters, chosen by name: one notation for every hook that compresses.

``rules={"*.bias": "dense", "lm_head.*": {"rank": 8}}`` sends biases as they are and gives the head another rank.
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from commhub._errors import HookOptionError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

_ONLY_DENSE = "a rule of this hook can only be 'dense'"


class Rules:
    """What a hook's ``rules`` option means, made when the hook is made.

    Args:
        rules: by glob on parameter names (``*``, ``?``, ``[ab]``; case matters), ``"dense"`` for what is sent
            uncompressed, or the settings that differ. Of the patterns that match a name, the longest decides: what
            order they are written in means nothing.
        defaults: the settings that a rule may change, with the values that hold elsewhere; empty where a rule may
            only be ``"dense"``. A rule's value has the type of the default, where that is not None.
        check: called with each rule's whole settings; its ValueError says what is wrong with them.

    Raises:
        HookOptionError: if a rule is malformed, names a setting that is not in ``defaults``, or fails ``check``.
    """

    def __init__(
        self,
        rules: Mapping[str, object],
        defaults: Mapping[str, object],
        check: Callable[[Mapping[str, object]], object] | None = None,
    ) -> None:
        self._defaults = dict(defaults)
        found = {pattern: self._settings(pattern, rule) for pattern, rule in rules.items()}
        self._rules = dict(sorted(found.items(), key=lambda item: (-len(item[0]), item[0])))
        for pattern, settings in self._rules.items():
            if check is not None and settings is not None:
                try:
                    check(settings)
                except ValueError as err:
                    raise HookOptionError(f"rules: {pattern!r}: {err}") from err

    def settings(self, names: Iterable[str]) -> dict[str, dict[str, object] | None]:
        """The settings of each parameter, or ``None`` for one that goes dense.

        Raises:
            HookOptionError: if a pattern matches no name, which is a slip of the pen more often than not.
        """
        names = list(names)
        for pattern in self._rules:
            if not any(fnmatchcase(name, pattern) for name in names):
                shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
                raise HookOptionError(f"rules: {pattern!r} matches no parameter; the names are like {shown}.")
        return {name: self._of(name) for name in names}

    def dense(self, names: Iterable[str]) -> frozenset[str]:
        """The parameters that go dense; raises as ``settings`` does."""
        return frozenset(name for name, settings in self.settings(names).items() if settings is None)

    def _of(self, name: str) -> dict[str, object] | None:
        return next((s for pattern, s in self._rules.items() if fnmatchcase(name, pattern)), self._defaults)

    def _settings(self, pattern: object, rule: object) -> dict[str, object] | None:
        if not isinstance(pattern, str):
            raise HookOptionError(f"rules: {pattern!r} is no pattern; write a glob on parameter names, as text.")
        if rule == "dense":
            return None
        if not isinstance(rule, dict):
            may_be = "it is 'dense' or a dict of settings" if self._defaults else _ONLY_DENSE
            raise HookOptionError(f"rules: {pattern!r} is {rule!r}; {may_be}.")
        for key, value in rule.items():
            if key not in self._defaults:
                may = f"a rule may set {', '.join(sorted(self._defaults))}" if self._defaults else _ONLY_DENSE
                raise HookOptionError(f"rules: {pattern!r} sets {key!r}; {may}.")
            default = self._defaults[key]
            if default is not None and not _fits(value, type(default)):
                raise HookOptionError(
                    f"rules: {pattern!r} sets {key} to {value!r}, which is no {type(default).__name__}."
                )
        return {**self._defaults, **rule}


def _fits(value: object, kind: type) -> bool:
    if isinstance(value, bool) or kind is bool:
        return isinstance(value, bool) and kind is bool
    return isinstance(value, int | float if kind is float else kind)
