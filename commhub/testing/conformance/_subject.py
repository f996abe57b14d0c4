"""What is examined: a hook or averager with options, and what its spec declares."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs

from commhub.registry._hookstring import HookString, parse
from commhub.registry._registry import HookInfo, info, resolve

if TYPE_CHECKING:
    from commhub.registry._recipe import Choice
    from commhub.registry._spec import AveragerSpec, HookSpec

_AT_ONCE = {"start_step": 0, "warmup_steps": 0}
"""Options that put a method off; the checks look at the method."""


@attrs.frozen
class Subject:
    """A hook string under examination. It travels to other processes as text.

    Attributes:
        text: the hook string as given.
    """

    text: str

    @property
    def parsed(self) -> HookString:
        """The hook string, taken apart."""
        return parse(self.text)

    @property
    def name(self) -> str:
        """The bare name, or ``distribution:name``."""
        parsed = self.parsed
        return f"{parsed.distribution}:{parsed.name}" if parsed.distribution else parsed.name

    @property
    def info(self) -> HookInfo:
        """The registry's row.

        Raises:
            UnknownHookError, HookConflictError, PluginError: as ``commhub.info``.
        """
        return info(self.name)

    @property
    def choice(self) -> Choice:
        """Resolved, with the options that put a method off set to zero where they were not given."""
        options = dict(self.parsed.options)
        spec = resolve(self.name).spec
        for name, value in _AT_ONCE.items():
            if spec.option(name) is not None and name not in spec.preset:
                options.setdefault(name, value)
        return resolve(self.name, options)

    @property
    def spec(self) -> HookSpec | AveragerSpec:
        """What the plugin declares."""
        return self.choice.spec

    @property
    def hook(self) -> str:
        """The hook string that the checks run."""
        return self.choice.canonical

    @property
    def options(self) -> dict[str, Any]:
        """All options."""
        return dict(self.choice.options)

    def promises(self, field: str) -> Any:
        """A property that the spec declares; ``None`` where its kind has none."""
        return getattr(self.spec, field, None)
