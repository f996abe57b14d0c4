"""What other packages hold a model in, known by the name of its type: who serves it, and what it holds.

A distribution that knows a package of models (a framework's adapter) has an entry point under that package's name in
``commhub.models.v1``. It leads to a module with ``MODELS``, a tuple of ``ModelSpec``. Nothing is imported here but
that module, and only for a model of that package.
"""

from __future__ import annotations

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

__all__ = ["ModelSpec", "advice_on", "spec_of"]

GROUP: Final = "commhub.models.v1"


def _is_line(_owner: object, field: attrs.Attribute[str], value: object) -> None:
    if not isinstance(value, str) or not value.strip() or "\n" in value:
        raise HookOptionError(f"{field.name} is {shown(value)}: write one line of text.")


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

    Raises:
        HookOptionError: when a field is malformed.
    """

    type: str = attrs.field(validator=_is_line)
    advice: str = attrs.field(validator=_is_line)
    models: Callable[[Any], Iterable[object]] | None = attrs.field(default=None, validator=_may_be_called)


def spec_of(model: object) -> ModelSpec | None:
    """What an installed adapter says of the model's type, the most derived that any knows.

    Raises:
        PluginError: if the adapter for its package cannot be loaded.
    """
    names = _type_names(model)
    known = {spec.type: spec for offer in _offers_on(names) for spec in _load(offer)}
    return next((known[name] for name in names if name in known), None)


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
    named = ((one.__dict__.get("__module__"), one.__qualname__) for one in type.mro(type(model)))
    return [f"{module}.{name}" for module, name in named if isinstance(module, str)]


def _package(type_name: str) -> str:
    return type_name.partition(".")[0]


def _offers_on(names: list[str]) -> list[Offer]:
    packages = set(map(_package, names))
    return [offer for offer in offers(GROUP) if offer.point in packages]


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
