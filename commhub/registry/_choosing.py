"""From what a user writes (a name, a hook string, a HookType member, a hook object) to a hook that can be made."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs

from commhub._errors import HookOptionError
from commhub.protocol._hook import is_averager
from commhub.protocol._nesting import InnerHook
from commhub.protocol._wire import short_dtype

from ._hookstring import HookString, parse
from ._registry import resolve
from ._spec import RESERVED

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import torch

    from commhub.protocol._hook import Hook

    from ._spec import Option


@attrs.frozen(kw_only=True)
class Chosen:
    """A hook that was chosen and can be made.

    Attributes:
        name: the registered name, also of what ``create`` made; the class's name for any other hook object.
        make: makes one; each call a new one, except for a hook object.
        given, options: the hook's options as given, and all of them.
        reserved: options of ``register`` that the hook string carried.
        prefix: the distribution, where the bare name would not be enough.
        distribution, version: whose hook it is; empty for a hook object.
        needs, devices: what its spec asks for.
        kind: ``"hook"`` or ``"averager"``.
        nested: the hook strings among its options.
    """

    name: str
    make: Callable[[], Hook]
    given: Mapping[str, object] = attrs.field(factory=dict)
    options: Mapping[str, object] = attrs.field(factory=dict)
    reserved: Mapping[str, object] = attrs.field(factory=dict)
    prefix: str | None = None
    distribution: str = ""
    version: str = ""
    needs: tuple[str, ...] = ()
    devices: tuple[str, ...] = ("cpu", "cuda")
    kind: str = "hook"
    nested: tuple[str, ...] = ()

    def packages(self) -> dict[str, str]:
        """The distributions that its hook strings lead to, its own included, with their versions.

        Raises:
            UnknownHookError, HookConflictError, PluginError, HookOptionError: for a nested hook that cannot be had.
        """
        found = {self.distribution: self.version} if self.distribution else {}
        for text in self.nested:
            found |= choose(text, {}).packages()
        return found

    @property
    def label(self) -> str:
        """How errors name it: ``powersgd (commhub-powersgd 0.1.0)``."""
        return f"{self.name} ({self.distribution} {self.version})" if self.distribution else self.name

    def text(self, wire: torch.dtype | None = None) -> str:
        """The canonical hook string, with ``register``'s ``wire`` where there is one."""
        given = dict(self.given)
        if wire is not None:
            given["wire"] = short_dtype(wire)
        bare = f"{self.prefix}:{self.name}" if self.prefix else self.name
        # The name as it is: that of a hook object's class need be no hook's name.
        return bare + str(HookString(name="x", options=given)).removeprefix("x") if given else bare


def choose(hook: object, options: Mapping[str, Any]) -> Chosen:
    """Resolve what the user wrote; nothing is made yet.

    Raises:
        UnknownHookError, HookConflictError, PluginError: see ``commhub.info``.
        HookOptionError: for an option that is unknown, given twice, or of the wrong type.
        TypeError: if ``hook`` is neither text nor has a ``reduce`` method.
    """
    if not isinstance(hook, str):
        return _of_object(hook, options)
    text = str(getattr(hook, "value", hook))
    parsed = parse(text)
    twice = sorted(parsed.options.keys() & options.keys())
    if twice:
        raise HookOptionError(f"{text}: {twice[0]!r} is given in the hook string and as an argument. Give it once.")
    every = {**parsed.options, **options}
    reserved = {key: every.pop(key) for key in sorted(RESERVED) if key in every}
    name = f"{parsed.distribution}:{parsed.name}" if parsed.distribution else parsed.name
    choice = resolve(name, every)
    return Chosen(
        name=choice.name,
        make=choice.create,
        given=choice.given,
        options=choice.options,
        reserved=reserved,
        prefix=parse(choice.canonical).distribution,
        distribution=choice.distribution,
        version=choice.version,
        needs=choice.spec.needs,
        devices=choice.spec.devices,
        kind=choice.kind,
        nested=tuple(str(choice.options[o.name]) for o in choice.spec.options if _is_nested(o, choice.options)),
    )


def _is_nested(option: Option, options: Mapping[str, object]) -> bool:
    return option.type == "hook" and options[option.name] is not None


def _of_object(hook: object, options: Mapping[str, Any]) -> Chosen:
    if isinstance(hook, type) or not callable(getattr(hook, "reduce", None)):
        shown = f"the class {hook.__name__}" if isinstance(hook, type) else type(hook).__name__
        raise TypeError(
            f"{shown} is no hook. Give a name, a hook string, a HookType member, or an object with reduce(bucket)."
        )
    reserved = {key: value for key, value in options.items() if key in RESERVED}
    extra = sorted(options.keys() - reserved.keys())
    name, inside = hook.made if isinstance(hook, InnerHook) else (type(hook).__name__, hook)
    if extra:
        raise HookOptionError(f"{name}: a hook object takes no options here, but {extra[0]!r} was given.")
    made: Any = hook
    kind = "averager" if is_averager(hook) else "hook"
    return Chosen(name=name, make=lambda: made, options=_plain_fields(inside), reserved=reserved, kind=kind)


def _plain_fields(hook: object) -> dict[str, object]:
    """The settings of an attrs class that can be compared between processes."""
    kind: type = type(hook)
    fields = attrs.fields(kind) if attrs.has(kind) else ()
    values = {field.alias or field.name: getattr(hook, field.name) for field in fields if field.init}
    return {name: value for name, value in values.items() if isinstance(value, bool | int | float | str | dict | None)}
