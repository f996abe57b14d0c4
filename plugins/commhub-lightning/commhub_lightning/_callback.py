"""``CommHubCallback``, as a part that is joined to the ``Callback`` of either package."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from commhub import RegistrationError

from ._hooked import Hooked, say
from ._strategy import OWN_HOOK, HookedStrategy

if TYPE_CHECKING:
    from collections.abc import Mapping

    import commhub

_REASONS = {
    "FSDPStrategy": "FSDP shards the model and averages gradients itself, and has no place for a DDP hook",
    "ModelParallelStrategy": "it shards the model and averages gradients itself, and has no place for a DDP hook",
    "DeepSpeedStrategy": "DeepSpeed's engine averages gradients itself",
    "XLAStrategy": "XLA averages gradients itself",
}


class HookedCallback:
    """Average gradients by a commhub hook in a trainer whose strategy is a DDP one: for configurations.

    It does what ``CommHubDDPStrategy`` does, with the strategy that the trainer has. On a single device it warns that
    there is nothing to communicate.

    Args:
        hook, hook_options, schedule, save_state, load_state: as for ``CommHubDDPStrategy``.

    Raises:
        UnknownHookError, HookConflictError, PluginError, HookOptionError: the hook cannot be had.
    """

    _ddp: type
    _single: type

    def __init__(
        self,
        hook: object,
        hook_options: Mapping[str, Any] | None = None,
        *,
        schedule: Mapping[int, str] | None = None,
        save_state: bool = True,
        load_state: bool = True,
    ) -> None:
        super().__init__()
        self._commhub = Hooked(
            type(self).__name__, hook, hook_options, schedule=schedule, save_state=save_state, load_state=load_state
        )
        self._serves = False

    @property
    def registration(self) -> commhub.Registration | None:
        """The hook at work, from the beginning of a fit on; ``None`` before, and on a single device."""
        return self._commhub.registration

    def setup(self, trainer: Any, pl_module: object, stage: str) -> None:  # noqa: ARG002 - Lightning's signature
        """Before a fit, look whether the trainer's strategy can serve a hook.

        Raises:
            RegistrationError: if it cannot, with the reason.
        """
        self._serves = False
        if stage != "fit":
            return
        self._commhub.release()
        self._commhub.forget()
        self._check(trainer)
        if isinstance(trainer.strategy, self._single):
            say(
                trainer,
                f"{type(self).__name__}: a single device has nothing to communicate; {self._commhub.name} rests.",
            )
            return
        self._commhub.refuse(trainer)
        self._serves = True

    def on_fit_start(self, trainer: Any, pl_module: object) -> None:  # noqa: ARG002
        """Register the hook: the model is wrapped by now, and the optimizers are made."""
        if self._serves:
            self._commhub.attach(trainer)

    def on_save_checkpoint(self, trainer: Any, pl_module: object, checkpoint: dict[str, Any]) -> None:  # noqa: ARG002
        """Add every rank's hook state; collective."""
        self._commhub.put(checkpoint, trainer)

    def on_load_checkpoint(self, trainer: Any, pl_module: object, checkpoint: dict[str, Any]) -> None:  # noqa: ARG002
        """Remember the hook state in it until the model is wrapped."""
        if self._serves:
            self._commhub.take(checkpoint, trainer.strategy)

    def _check(self, trainer: Any) -> None:
        strategy, owner = trainer.strategy, type(self).__name__
        if sum(isinstance(callback, HookedCallback) for callback in trainer.callbacks) > 1:
            raise RegistrationError(f"the trainer has several {owner}s, and a model takes one hook. Leave one.")
        if isinstance(strategy, HookedStrategy):
            raise RegistrationError(f"the trainer has {owner} and a commhub strategy, and a model takes one hook.")
        if isinstance(strategy, self._ddp):
            if given := [name for name in OWN_HOOK if getattr(strategy, f"_{name}", None) is not None]:
                raise RegistrationError(
                    f"the trainer's {type(strategy).__name__} has {given[0]}=, and a model takes one hook. "
                    "Leave it out."
                )
            return
        if not isinstance(strategy, self._single):
            name = type(strategy).__name__
            reason = _REASONS.get(name, "it does not wrap the model in DistributedDataParallel")
            raise RegistrationError(f"{owner} cannot serve {name}: {reason}. Use strategy='ddp', or leave it out.")
