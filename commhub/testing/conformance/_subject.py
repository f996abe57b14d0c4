"""What is examined: a hook or averager with options, and what its spec declares."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs

from commhub.registry._hookstring import HookString, parse
from commhub.registry._recipe import resolve
from commhub.registry._registry import HookInfo, info

if TYPE_CHECKING:
    from commhub.registry._recipe import Recipe
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
    def recipe(self) -> Recipe:
        """Resolved, with the options that put a method off set to zero where they were not given."""
        recipe = resolve(self.text)
        spec = recipe.spec
        assert spec is not None
        free = [name for name in _AT_ONCE if spec.option(name) is not None and name not in spec.preset]
        return resolve(self.text, {name: _AT_ONCE[name] for name in free if name not in recipe.given})

    @property
    def spec(self) -> HookSpec | AveragerSpec:
        """What the plugin declares."""
        spec = self.recipe.spec
        assert spec is not None
        return spec

    @property
    def hook(self) -> str:
        """The hook string that the checks run."""
        return str(self.recipe)

    @property
    def options(self) -> dict[str, Any]:
        """All options."""
        return dict(self.recipe.options)

    def promises(self, field: str) -> Any:
        """A property that the spec declares; ``None`` where its kind has none."""
        return getattr(self.spec, field, None)
