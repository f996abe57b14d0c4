"""What other packages hold a model in, known by the name of its type: who serves it, and what it holds.

A distribution that knows a package of models (a framework's adapter) has an entry point under that package's name in
``commhub.models.v1``. It leads to a module with ``MODELS``, a tuple of ``ModelSpec``. Nothing is imported here but
that module, and only for a model of that package.
"""

from __future__ import annotations

import contextlib
from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

import attrs
import importlib_metadata

from commhub._errors import HookOptionError, PluginError, described
from commhub._printable import shown, visible

from ._index import offers
from ._loading import put_back

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from ._index import Offer

__all__ = ["ModelSpec", "advice_on", "owner_advice", "spec_of"]

GROUP: Final = "commhub.models.v1"


def _is_line(_owner: object, field: attrs.Attribute[str], value: object) -> None:
    if not isinstance(value, str) or not value.strip() or "\n" in value:
        raise HookOptionError(f"{field.name} is {shown(value)}: write one line of text.")


def _is_bool(_owner: object, field: attrs.Attribute[Any], value: object) -> None:
    if not isinstance(value, bool):
        raise HookOptionError(f"{field.name} is {shown(value)}: it is True or False.")


def _may_be_called(_owner: object, field: attrs.Attribute[Any], value: object) -> None:
    if value is not None and not callable(value):
        raise HookOptionError(f"{field.name} is {shown(value)}: give a function, or None.")


@attrs.frozen(kw_only=True)
class ModelSpec:
    """A type of another package that people hand to ``register`` in a model's place.

    Attributes:
        type: its full name, ``"package.module.Class"``, as ``type(x).__module__`` and ``__qualname__`` say it; classes
            that derive from it count too.
        advice: whole sentences: which package and call serve it, or why nothing can.
        models: called with one such object, gives the models that it holds, so that ``commhub.registration`` finds
            the hook at work on them; ``None`` where it holds none.
        owns_gradients: whether its gradients are reduced by what is in no hook's reach: then ``register`` refuses it
            even where it is or holds a DDP model, and ``manual`` does too, with the advice as the reason.

    Raises:
        HookOptionError: when a field is malformed.
    """

    type: str = attrs.field(validator=_is_line)
    advice: str = attrs.field(validator=_is_line)
    models: Callable[[Any], Iterable[object]] | None = attrs.field(default=None, validator=_may_be_called)
    owns_gradients: bool = attrs.field(default=False, validator=_is_bool)


def spec_of(model: object) -> ModelSpec | None:
    """What an installed adapter says of the model's type, the most derived that any knows.

    Raises:
        PluginError: if the adapter for its package cannot be loaded.
    """
    names = _type_names(model)
    known = {spec.type: spec for offer in _offers_on(names) for spec in _load(offer)}
    return next((known[name] for name in names if name in known), None)


def owner_advice(kinds: Iterable[type]) -> tuple[str, str] | None:
    """Of types of which some spec says that they own their gradients, the first one's full name, and its advice.

    An adapter that cannot be loaded says nothing here.
    """
    named = [names for kind in kinds if _is_foreign(names := _names_of(kind))]
    every: list[ModelSpec] = []
    for offer in _offers_on([name for names in named for name in names]) if named else ():
        with contextlib.suppress(PluginError):
            every += _load(offer)
    known, owning = {spec.type: spec for spec in every}, {spec.type for spec in every if spec.owns_gradients}
    for names in named:
        if owning.intersection(names):
            return visible(names[0]), visible(next(known[name] for name in names if name in known).advice)
    return None


def _is_foreign(names: list[str]) -> bool:
    """Whether it is a type of another package than PyTorch, or derives from one."""
    return not {_package(name) for name in names} <= {"torch", "builtins", "__main__", "typing", "abc", "collections"}


def advice_on(model: object) -> str:
    """What to do with a model of another package, in sentences; empty where nobody knows."""
    try:
        spec = spec_of(model)
    except PluginError as error:
        return str(error)
    if spec is not None:
        return visible(spec.advice)
    extras = _own_extras()
    for name in _type_names(model):
        extra = _package(name).replace("_", "-")
        if extra in extras:
            return f"What serves {extra} comes with: pip install 'commhub[{extra}]'."
    return ""


def _type_names(model: object) -> list[str]:
    return _names_of(type(model))


def _names_of(kind: type) -> list[str]:
    named = ((one.__dict__.get("__module__"), one.__qualname__) for one in type.mro(kind))
    return [f"{module}.{name}" for module, name in named if isinstance(module, str)]


def _package(type_name: str) -> str:
    return type_name.partition(".")[0]


def _offers_on(names: list[str]) -> list[Offer]:
    """Those on these types' packages; of two that know one type the later counts, and commhub's own come first."""
    packages = set(map(_package, names))
    found = [offer for offer in offers(GROUP) if offer.point in packages]
    return sorted(found, key=lambda offer: offer.distribution != "commhub")


def _load(offer: Offer) -> tuple[ModelSpec, ...]:
    try:
        with put_back():
            specs = import_module(offer.value).MODELS
        if not isinstance(specs, tuple) or not all(isinstance(spec, ModelSpec) for spec in specs):
            raise TypeError(f"MODELS is {shown(specs, 200)}, not a tuple of ModelSpec")
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        reason = " ".join(described(error).split())
        raise PluginError(
            f"{offer.distribution} serves models of {offer.point}, but loading {visible(offer.value)} failed with "
            f"{reason}. Repair, upgrade or uninstall {offer.distribution}."
        ) from error
    return specs


def _own_extras() -> list[str]:
    try:
        return importlib_metadata.metadata("commhub").get_all("Provides-Extra") or []
    except importlib_metadata.PackageNotFoundError:  # run from a source tree
        return []
