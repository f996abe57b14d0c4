"""Whether a hook can work on a target: what it needs, and what the target does not allow."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from commhub._errors import RegistrationError
from commhub.protocol._hook import can_scatter
from commhub.protocol._nesting import LocalSteps

from ._trained import nbytes_of

if TYPE_CHECKING:
    from commhub.protocol._hook import Averager, Hook
    from commhub.registry._recipe import Recipe

    from ._target import Target


def made(target: Target, chosen: Recipe) -> Hook:
    """The hook that was chosen, made.

    Raises:
        RegistrationError: where it cannot work on ``target``, or needs what was not given.
    """
    hook = chosen.make() if chosen.kind == "hook" else LocalSteps(cast("Averager", chosen.make()))
    if target.device.type not in chosen.devices:
        raise RegistrationError(
            f"{chosen.label} works on {', '.join(chosen.devices)}; the gradients are on {target.device}."
        )
    for name, parameter in target.parameters:
        nbytes_of(name, parameter)
    given = {"optimizer": bool(target.optimizers), "scaler": target.scaler is not None}
    for need in chosen.needs:
        if not given.get(need, True):
            raise RegistrationError(f"{chosen.label} needs {need}=; pass it to register().")
    if target.no_optimizer and getattr(hook, "steps_optimizer", False):
        raise RegistrationError(f"{chosen.label} steps the optimizer in backward. {target.no_optimizer}")
    if target.scatters and not can_scatter(hook):
        raise RegistrationError(
            f"{chosen.label} has no reduce_scatter, with which it would work inside the group that the model is "
            f"sharded over. {target.scatters}"
        )
    return hook
