"""What an update in backward cannot know of, and what says so: each function raises RegistrationError or nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from commhub import RegistrationError

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from torch import Tensor

_PLAIN = (bool, int, float, complex, str, tuple, type(None))


def fingerprint(tensor: Tensor) -> tuple[int, int]:
    """What is another when the tensor is replaced or written to."""
    return tensor.data_ptr(), tensor._version


def settings(group: Mapping[str, Any]) -> dict[str, object]:
    """What can be compared of a group, the parameters left out."""
    found: dict[str, object] = {k: v for k, v in group.items() if k != "params" and isinstance(v, _PLAIN)}
    found.update((k, fingerprint(v)) for k, v in group.items() if isinstance(v, torch.Tensor))
    return found


def belongings(optimizer: Any) -> dict[str, object]:
    """What an optimizer keeps besides its parameters' state; booleans only say that something was looked at once."""
    local = getattr(optimizer, "optim", optimizer)
    found = {f"the attribute {k!r}": v for k, v in settings(vars(local)).items() if not isinstance(v, bool)}
    for number, group in enumerate(optimizer.param_groups):
        found.update((f"{k!r} of group {number}", v) for k, v in settings(group).items())
    return found


def refuse_scaler(optimizer: Any) -> None:
    """Raise if a loss scaler has called ``step()``: it has put the scale and its findings on the optimizer."""
    found = [name for name in ("found_inf", "grad_scale") if name in vars(optimizer)]
    if not found:
        return
    for name in found:
        delattr(optimizer, name)  # the scaler would have, if step() had come back
    raise RegistrationError(
        f"a loss scaler steps this {type(optimizer).__name__}, whose parameters are updated in backward, with "
        "gradients that are still scaled. Give the scaler to register(..., scaler=scaler): nothing is updated then "
        "before all gradients are known to be finite."
    )


def check_gradients(optimizer: Any, final: Mapping[int, tuple[int, int]], stepped: Collection[int]) -> None:
    """Raise if a gradient is not what it was at the end of backward, in fingerprints by the parameter's identity."""
    for parameter in (p for group in optimizer.param_groups for p in group["params"]):
        if id(parameter) not in final or (stepped and id(parameter) not in stepped):
            continue
        if parameter.grad is None and not stepped:
            continue  # dropped in time
        if parameter.grad is None or fingerprint(parameter.grad) != final[id(parameter)]:
            done = (
                "in backward, which had used them already"
                if stepped
                else "in backward from the next step on (in this one nothing was updated yet)"
            )
            raise RegistrationError(
                f"gradients were changed between backward and {type(optimizer).__name__}.step(), but their update "
                f"runs {done}. Clipping by global norm, unscaling and the like need every gradient first and cannot "
                "overlap: leave them out, or register the inner hook by itself."
            )


def check_settings(optimizer: Any, used: Mapping[int, Mapping[str, object]]) -> None:
    """Raise if groups, by number, have other settings than those an update has used."""
    for number, before in used.items():
        now = settings(optimizer.param_groups[number])
        changed = [key for key in before if now.get(key) != before[key]]
        if changed:
            raise RegistrationError(
                f"{changed[0]!r} of group {number} of {type(optimizer).__name__} was changed between backward and "
                "step(), but the update ran in backward, with the former value. Change settings after step()."
            )


def check_belongings(optimizer: Any, before: Mapping[str, object]) -> None:
    """Raise if ``step()`` has changed what the optimizer keeps for all its parameters together."""
    changed = [key for key, value in belongings(optimizer).items() if value != before.get(key)]
    if changed:
        raise RegistrationError(
            f"{type(optimizer).__name__} keeps {changed[0]} for all its parameters together and changes it in "
            "step(): its update is not one of each parameter, and cannot run bucket by bucket."
        )
