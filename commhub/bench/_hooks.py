"""Hook strings and links as the bench takes them: checked, in canonical form, ready to be measured."""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs

from commhub._errors import CommhubError
from commhub.drivers._network import Network

from . import _pytorch

if TYPE_CHECKING:
    from commhub.registry._recipe import Recipe

    from ._options import Settings

_NOTHING = "noop"
_DENSE_PHASE = "start_step"
"""The option by which hooks that begin with plain all-reduces say when they start to compress."""


def network(settings: Settings) -> Network | None:
    """The link to emulate, if any.

    Raises:
        ValueError: if its text is not understood.
    """
    return Network.parse(settings.bandwidth, settings.latency) if settings.emulated else None


def in_canonical_form(text: str) -> str:
    """Return ``text`` as register would print it; PyTorch's own hooks are known too. Imports no torch.

    Raises:
        CommhubError: if it cannot be resolved.
    """
    return _pytorch.canonical(text) if _pytorch.is_pytorchs(text) else str(_resolve(text))


def in_steady_state(text: str) -> str:
    """Return the hook string to train with in place of ``text``.

    A hook that begins with a dense phase (``start_step``, a thousand steps in real training) would be measured
    as a plain all-reduce, so ``start_step`` becomes 0 where it was not given, in hooks inside another one too.
    """
    if _pytorch.is_pytorchs(text):
        return text
    recipe = _resolve(text)
    assert recipe.spec is not None
    free = [option for option in recipe.spec.options if option.name not in recipe.spec.preset]
    options = dict(recipe.given)
    for option in free:
        inner = options.get(option.name, option.default)
        if option.type == "hook" and inner is not None and in_steady_state(str(inner)) != in_canonical_form(str(inner)):
            options[option.name] = in_steady_state(str(inner))
        if option.name == _DENSE_PHASE:
            options.setdefault(_DENSE_PHASE, 0)
    return str(attrs.evolve(recipe, given=options))


def _resolve(text: str) -> Recipe:
    from commhub.registry._recipe import resolve

    return resolve(text, reserved=("wire",))


def sending_nothing() -> str | None:
    """The hook that sends nothing, in canonical form: its steps show what steps take without communication.

    ``None`` where it is not installed.
    """
    try:
        return in_canonical_form(_NOTHING)
    except CommhubError:
        return None
