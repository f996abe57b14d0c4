"""What a user gives ``register`` beside the model, checked in one place."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs
import torch

from commhub._errors import HookOptionError, RegistrationError
from commhub._printable import shown
from commhub.registry._recipe import Recipe, choose

from ._target import checked_timeout

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch.distributed as dist

_OWN = frozenset({"wire", "process_group", "optimizer", "scaler"})
"""What a hook may need of ``register``'s own arguments, by the names that hooks know them under."""


@attrs.frozen(kw_only=True, eq=False)
class Given:
    """The arguments of ``register``, as they came: nothing is checked before the peers can hear of it."""

    hook: object
    options: Mapping[str, Any]
    process_group: Any = None
    optimizer: Any = None
    scaler: Any = None
    wire: Any = None
    verify: Any = True
    timeout: Any = None

    def chosen(self, group: dist.ProcessGroup, device: torch.device) -> Recipe:
        """The hook, once everything else is right.

        Raises:
            CommhubError: for whatever is not.
        """
        check_verify(self.verify)
        checked_timeout(self.timeout, group, device)
        optimizers_of(self.optimizer)
        check_scaler(self.scaler)
        every = dict(self.options)
        for name in ("wire", "process_group", "optimizer", "scaler"):
            if getattr(self, name) is not None:
                every[name] = getattr(self, name)
        chosen = choose(self.hook, every)
        strange = sorted(chosen.reserved.keys() - _OWN)
        if strange:
            raise HookOptionError(f"{strange[0]!r} cannot stand in a hook string; pass it to register().")
        return chosen

    @property
    def optimizers(self) -> tuple[torch.optim.Optimizer, ...]:
        """Those that are some."""
        return optimizers_of(self.optimizer, strict=False)


def optimizers_of(given: object, *, strict: bool = True) -> tuple[torch.optim.Optimizer, ...]:
    """One optimizer, several or none, as a tuple.

    Raises:
        RegistrationError: for what is none of these, if ``strict``; else that counts as none.
    """
    if given is None:
        return ()
    several = tuple(given) if isinstance(given, list | tuple) else (given,)
    if all(isinstance(one, torch.optim.Optimizer) for one in several):
        lacking = [type(one).__name__ for one in several if _lacks_hooks(one)]
        if not lacking:
            return several
        if strict:
            raise RegistrationError(
                f"{lacking[0]} has no step hooks of its own: it wraps an optimizer. Give the one in it."
            )
        return ()
    if strict:
        raise RegistrationError(f"optimizer is {type(given).__name__}; give a torch.optim.Optimizer or a list of them.")
    return ()


def _lacks_hooks(optimizer: torch.optim.Optimizer) -> bool:
    """Whether it is none in fact: a wrapper that only derives from the class, and was never set up as one."""
    try:
        held = (optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks, optimizer.param_groups)
    except Exception:  # noqa: BLE001 - the wrapper may be of anybody's making
        return True
    return not all(hasattr(one, "__len__") for one in held)


def check_verify(verify: object) -> None:
    """Raise RegistrationError for what is no bool."""
    if not isinstance(verify, bool):
        raise RegistrationError(f"verify is {shown(verify)}; it is True or False.")


def check_scaler(scaler: Any) -> None:
    """Raise RegistrationError for what is no loss scaler."""
    if scaler is not None and not all(callable(getattr(scaler, name, None)) for name in ("is_enabled", "get_scale")):
        raise RegistrationError(f"scaler is {shown(scaler)}; give the torch.amp.GradScaler in use, or None.")
