"""From what a user writes (a name, a hook string, a ``HookType`` member, a hook object) to a hook that can be made.

A hook string is read here once; after that there is the recipe. ``load`` and ``make`` are the only ways from a name to
a plugin's own code, so its failures get a name here. Nothing here loads torch.
"""

from __future__ import annotations

import inspect
from importlib import import_module
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, cast

import attrs

from commhub._errors import CommhubError, HookOptionError, HookOptionTypeError, PluginError, UnknownHookError, described
from commhub._printable import message_of, shown
from commhub.protocol._hook import is_averager
from commhub.protocol._nesting import InnerHook
from commhub.protocol._wire_names import short_name
from commhub.registry import _lookup

from ._hookstring import parse, parse_any, write
from ._options import check_options
from ._registry import specs_of
from ._spec import RESERVED

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping

    from ._spec import AveragerSpec, HookSpec

__all__ = ["Recipe", "choose", "resolve"]


def _fixed(mapping: Mapping[str, object]) -> Mapping[str, object]:
    return MappingProxyType(dict(mapping))


@attrs.frozen(kw_only=True)
class Recipe:
    """A hook or averager that was chosen, and can be made. ``str()`` is the hook string that leads here again.

    Attributes:
        name: the registered name, also of what ``commhub.create`` made; the class's name for any other hook object.
        distribution: whose hook it is; empty for a hook object.
        version: the distribution's; empty for a hook object.
        qualified: whether a hook string needs the distribution, because the bare name leads elsewhere or nowhere.
        given: the user's options, checked and converted.
        options: all options, with defaults and preset.
        reserved: what was given of ``register``'s own arguments, as it was given.
        spec: what the plugin declares; ``None`` for a hook object.
        instance: the hook object; ``None`` for a hook that has yet to be made.

    Raises:
        HookOptionError: if an option has a value that cannot be written in a hook string.
    """

    name: str
    distribution: str = ""
    version: str = ""
    qualified: bool = False
    given: Mapping[str, object] = attrs.field(factory=dict, converter=_fixed, hash=False)
    options: Mapping[str, object] = attrs.field(factory=dict, converter=_fixed, hash=False)
    reserved: Mapping[str, object] = attrs.field(factory=dict, converter=_fixed, hash=False)
    spec: HookSpec | AveragerSpec | None = None
    instance: Any = attrs.field(default=None, eq=id)
    _text: str = attrs.field(init=False, repr=False, eq=False)

    def __attrs_post_init__(self) -> None:
        given = dict(self.given) if self.wire is None else {**self.given, "wire": self.wire}
        object.__setattr__(self, "_text", write(self.name, self.distribution if self.qualified else None, given))

    def __str__(self) -> str:
        return self._text

    @property
    def label(self) -> str:
        """How errors name it: ``powersgd (commhub-powersgd 0.1.0)``."""
        return f"{self.name} ({self.distribution} {self.version})" if self.distribution else self.name

    @property
    def wire(self) -> str | None:
        """The wire dtype that was given, in its shortest spelling; what is no dtype stays as it is."""
        wire = self.reserved.get("wire")
        return None if wire is None else short_name(wire)

    @property
    def kind(self) -> str:
        """``"hook"`` or ``"averager"``."""
        if self.spec is not None:
            return self.spec.kind
        return "averager" if is_averager(self.instance) else "hook"

    @property
    def needs(self) -> tuple[str, ...]:
        """What must be given at ``register`` besides the model."""
        return () if self.spec is None else self.spec.needs

    @property
    def devices(self) -> tuple[str, ...]:
        """Where its tensors may live."""
        return ("cpu", "cuda") if self.spec is None else self.spec.devices

    @property
    def nested(self) -> tuple[str, ...]:
        """The hook strings among its options."""
        hooks = [] if self.spec is None else [option.name for option in self.spec.options if option.type == "hook"]
        return tuple(str(self.options[name]) for name in hooks if self.options[name] is not None)

    def packages(self) -> dict[str, str]:
        """The distributions that its hook strings lead to, its own included, with their versions.

        Raises:
            UnknownHookError, HookConflictError, PluginError, HookOptionError: for a nested hook that cannot be had.
        """
        found = {self.distribution: self.version} if self.distribution else {}
        for text in self.nested:
            found |= choose(text, {}).packages()
        return found

    def wrote(self, text: str) -> bool:
        """Whether ``text`` is the hook string of the same hook and options, whatever its wire and distribution.

        Raises:
            HookOptionError: if the text cannot be read.
        """
        if text == self._text:
            return True
        other = parse_any(text)
        theirs = {key: value for key, value in other.options.items() if key != "wire"}
        return write(other.name, None, theirs) == write(self.name, None, self.given)

    def load(self) -> Callable[..., Any]:
        """Import what makes the hook.

        Raises:
            PluginError: from the original, when it cannot be imported or is not callable.
        """
        if self.spec is None:
            return lambda: self.instance
        module, _, attribute = self.spec.factory.partition(":")
        try:
            factory = getattr(import_module(module), attribute)
        except KeyboardInterrupt:
            raise
        except BaseException as err:
            raise PluginError(
                f"{self.label}: its factory {self.spec.factory} cannot be imported: {described(err)}. "
                f"Repair, upgrade or uninstall {self.distribution}."
            ) from err
        if not callable(factory):
            raise PluginError(f"{self.label}: its factory {self.spec.factory} is {shown(factory)}, not a callable.")
        return cast("Callable[..., Any]", factory)

    def make(self) -> Any:
        """A hook or averager: each call makes a new one, except of a hook object. Errors of commhub's own pass.

        Raises:
            HookOptionError: when the factory refuses its options with TypeError or ValueError.
            PluginError: when it cannot be imported or fails in another way.
        """
        if self.spec is None:
            return self.instance
        factory = self.load()
        try:
            return factory(**self.options)
        except CommhubError:
            raise
        except (TypeError, ValueError) as err:
            raise HookOptionError(f"{self.label}: {message_of(err)}") from err
        except Exception as err:
            raise PluginError(f"{self.label}: its factory failed with {described(err)}.") from err


def choose(hook: object, options: Mapping[str, Any]) -> Recipe:
    """Resolve what the user wrote; nothing is made yet. Arguments of ``register`` may stand among the options.

    Raises:
        UnknownHookError, HookConflictError, PluginError: see ``commhub.info``.
        HookOptionError: for an option that is unknown, given twice, or of the wrong type.
        HookOptionError: and a TypeError too, if ``hook`` is neither text nor has a ``reduce`` method.
    """
    if isinstance(hook, str):
        return resolve(str(getattr(hook, "value", hook)), options, reserved=RESERVED)
    return _of_object(hook, options)


def resolve(
    text: str, options: Mapping[str, object] | None = None, *, kind: str | None = None, reserved: Collection[str] = ()
) -> Recipe:
    """Choose a hook or averager by name, ``distribution:name`` or hook string, and check its options.

    Loads the specs of the one plugin that owns the name, and nothing else.

    Args:
        text: the hook string.
        options: more options.
        kind: ``"hook"`` or ``"averager"``, where only that will do.
        reserved: those arguments of ``register`` that may stand among the options.

    Raises:
        UnknownHookError, HookConflictError, PluginError: see ``commhub.info``; a name of another kind is unknown too.
        HookOptionError: for an option that is unknown, given twice, or of the wrong type.
    """
    parsed = parse(text)
    options = options or {}
    if twice := sorted(parsed.options.keys() & options.keys()):
        raise HookOptionError(f"{text}: {twice[0]!r} is given in the hook string and as an argument. Give it once.")
    every = {**parsed.options, **options}
    _refuse_state(every)
    claim = _lookup.find(parsed.name, parsed.distribution)
    if kind is not None and claim.kind != kind:
        raise UnknownHookError(f"{claim.name!r} of {claim.distribution} is of kind {claim.kind!r}, not {kind!r}.")
    spec = specs_of(claim)[claim.name]
    own = {key: value for key, value in every.items() if key not in reserved}
    given, effective = check_options(spec, f"{claim.name} ({claim.distribution} {claim.version})", own)
    return Recipe(
        name=claim.name,
        distribution=claim.distribution,
        version=claim.version,
        qualified=_lookup.names().get(claim.name) != claim,
        given=given,
        options=effective,
        reserved={key: every[key] for key in sorted(every.keys() - own.keys())},
        spec=spec,
    )


def _refuse_state(options: Mapping[str, object]) -> None:
    if "state" in options:
        raise HookOptionError(
            "no state is given: commhub makes and keeps what a hook remembers. What PyTorch's state objects hold are "
            "options of the hook, which `commhub info` lists."
        )


def _of_object(hook: object, options: Mapping[str, Any]) -> Recipe:
    if _is_pytorch_s(hook):
        raise HookOptionTypeError(
            f"{getattr(hook, '__name__', 'the function')} is a function of (state, bucket), as PyTorch's hooks are. "
            "commhub_compat.foreign(state, function), of commhub-compat, makes a hook of one that communicates by "
            "itself; those that commhub-compat offers go into model.register_comm_hook(state, function)."
        )
    if isinstance(hook, type) or not callable(getattr(hook, "reduce", None)):
        shown = f"the class {hook.__name__}" if isinstance(hook, type) else type(hook).__name__
        raise HookOptionTypeError(
            f"{shown} is no hook. Give a name, a hook string, a HookType member, or an object with reduce(bucket)."
        )
    _refuse_state(options)
    reserved = {key: value for key, value in options.items() if key in RESERVED}
    extra = sorted(options.keys() - reserved.keys())
    name, inside = hook.made if isinstance(hook, InnerHook) else (type(hook).__name__, hook)
    if extra:
        raise HookOptionError(f"{name}: a hook object takes no options here, but {extra[0]!r} was given.")
    return Recipe(name=name, options=_plain_fields(inside), reserved=reserved, instance=hook)


def _is_pytorch_s(hook: object) -> bool:
    """Whether it is a function such as ``DistributedDataParallel.register_comm_hook`` takes."""
    if not callable(hook) or isinstance(hook, type) or hasattr(hook, "reduce"):
        return False
    try:
        return list(inspect.signature(hook).parameters)[1:2] == ["bucket"]
    except (TypeError, ValueError):  # it says nothing of its arguments
        return False


def _plain_fields(hook: object) -> dict[str, object]:
    """The settings of an attrs class that can be compared between processes."""
    kind: type = type(hook)
    fields = attrs.fields(kind) if attrs.has(kind) else ()
    values = {field.alias or field.name: getattr(hook, field.name) for field in fields if field.init}
    return {name: value for name, value in values.items() if isinstance(value, bool | int | float | str | dict | None)}
