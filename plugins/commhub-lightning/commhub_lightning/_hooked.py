"""What the strategy and the callback have in common: one hook, checked early, registered in fit, saved and restored.

It knows a trainer by what both packages' trainers have, and imports neither package.

Hook state lies in the ``.ckpt`` file itself, under ``"commhub"``, every rank's: so the file can be copied, moved,
linked to and removed like any other, and is all that a run needs to go on.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from torch.nn.parallel import DistributedDataParallel

import commhub
from commhub import CheckpointError, HookOptionError, RegistrationError

from ._gathering import all_come, gather

KEY = "commhub"
"""Under which a checkpoint holds ``{"ranks": [each rank's Registration.state_dict()]}``."""

_PASSED = ("optimizer", "scaler")


class Hooked:
    """One hook for the fits of one trainer.

    Args:
        owner: the class that the user wrote, for messages.
        hook, options: as for ``commhub.register``, but for the optimizers and the scaler, which the trainer has.
        schedule: which hooks follow, by step, as for ``Registration.schedule``.
        save_state: whether checkpoints get the hook's state.
        load_state: whether it is taken from a checkpoint that a fit begins with.

    Attributes:
        name: the hook's.
        registration: of the last fit; ``None`` before it, and where there is nothing to register on.

    Raises:
        UnknownHookError, HookConflictError, PluginError, HookOptionError: the hook cannot be had.
    """

    def __init__(
        self,
        owner: str,
        hook: object,
        options: Mapping[str, Any] | None,
        *,
        schedule: Mapping[int, str] | None,
        save_state: bool,
        load_state: bool,
    ) -> None:
        self.owner, self.hook, self.options = owner, hook, _options_of(options, owner)
        if passed := [name for name in _PASSED if name in self.options]:
            raise HookOptionError(f"{owner} passes {passed[0]}= by itself, as the trainer has it. Leave it out.")
        made = commhub.checked(hook, **self.options)
        self.name, self.schedule = made.made[0], _schedule_of(schedule, owner)
        hooks = [made, *map(commhub.checked, self.schedule.values())]
        early = (one.made[0] for one in hooks if getattr(one, "steps_optimizer", False))
        self._steps_optimizer: str | None = next(early, None)
        self.registration: commhub.Registration | None = None
        self._save_state, self._load_state = save_state, load_state
        self._ranks: list[Any] | None = None

    def __getstate__(self) -> dict[str, Any]:
        # A launcher that starts processes pickles its strategy and trainer; registrations stay in their process.
        return {**vars(self), "registration": None}

    def release(self) -> None:
        """Let go of an earlier fit's registration, on this rank alone."""
        registration, self.registration = self.registration, None
        if registration is not None:
            registration.close()

    def forget(self) -> None:
        """Forget a checkpoint that was read for something else than a fit."""
        self._ranks = None

    def refuse(self, trainer: Any) -> None:
        """Look at what is known before the model is wrapped.

        Raises:
            RegistrationError: if the trainer would change gradients after the hook has stepped the optimizer with them.
        """
        if trainer.gradient_clip_val and self._steps_optimizer:
            raise RegistrationError(
                f"{self._steps_optimizer} steps the optimizer within backward, before Trainer(gradient_clip_val="
                f"{trainer.gradient_clip_val}) could clip the gradients. Leave one of them out."
            )

    def attach(self, trainer: Any) -> None:
        """Register on the DDP model of a fit that is about to begin, and take up a checkpoint's state; collective.

        Raises:
            RegistrationError, HookMismatchError: as ``commhub.register``.
            CheckpointError: if the checkpoint's state is damaged, or of another hook or model.
        """
        strategy = trainer.strategy
        optimizers = [getattr(one, "_optimizer", one) for one in strategy.optimizers]
        self.registration = commhub.register(
            strategy.model,
            self.hook,
            optimizer=optimizers or None,
            scaler=getattr(trainer.precision_plugin, "scaler", None),
            **self.options,
        )
        if self.schedule:  # before a checkpoint is taken up, whose state may be of a hook that has followed
            self.registration.schedule(self.schedule)
        if trainer.world_size == 1:
            say(trainer, f"{self.owner}: one process, so {self.registration} runs and there is nothing to communicate.")
        ranks, self._ranks = self._ranks, None
        if ranks is not None:
            self._restore(ranks, trainer.strategy)
        elif self._load_state and trainer.ckpt_path is not None:
            say(
                trainer,
                f"{self.owner}: the checkpoint {trainer.ckpt_path} holds no hook state, so {self.registration} begins "
                "anew, with its warm-up and an empty memory.",
            )

    def take(self, checkpoint: Mapping[str, Any], strategy: Any) -> None:
        """Remember the hook's state in a checkpoint that Lightning has read; in the midst of a fit, take it up.

        Raises:
            CheckpointError: if what the checkpoint holds is no hook state, or in a fit does not fit.
        """
        if not self._load_state:
            return
        ranks = None if KEY not in checkpoint else _ranks_of(checkpoint[KEY])
        if self.registration is None or not isinstance(strategy.model, DistributedDataParallel):
            self._ranks = ranks
        elif ranks is not None:  # a search for a learning rate puts the run back to where it was
            self._restore(ranks, strategy)

    def put(self, checkpoint: dict[str, Any], trainer: Any) -> None:
        """Add every rank's state to the checkpoint that rank 0 is about to write; collective.

        After an exception that not all ranks had, the checkpoint is left without it, so that it can be written.

        Raises:
            CheckpointError: on all ranks, if any rank's state cannot be had.
        """
        registration = self.registration
        if not self._save_state:
            return
        if registration is None:
            ranks = self._ranks  # it was read, and waits for the model
        elif trainer.interrupted and not all_come():
            say(trainer, f"{self.owner}: not all ranks save, so this checkpoint has no hook state.")
            return
        else:
            ranks = gather(registration.state_dict, trainer.strategy.root_device)
        if ranks is not None:
            checkpoint[KEY] = {"ranks": ranks}

    def _restore(self, ranks: list[Any], strategy: Any) -> None:
        registration = self.registration
        assert registration is not None
        error: CheckpointError | None = None
        own = ranks[strategy.global_rank] if len(ranks) == strategy.world_size else ranks
        try:
            registration.load_state_dict(own)
        except CheckpointError as err:
            error = err
        # A rank that went on would train with others that did not.
        if strategy.reduce_boolean_decision(error is None):
            return
        reason = "another rank cannot load it." if error is None else str(error)
        raise CheckpointError(
            f"the hook state in the checkpoint: {reason} To go on without it, give {self.owner}(load_state=False)."
        ) from error


def say(trainer: Any, text: str) -> None:
    """Warn, on rank 0."""
    if trainer.is_global_zero:
        warnings.warn(text, stacklevel=3)


def _options_of(given: object, owner: str) -> dict[str, Any]:
    if given is None:
        return {}
    if not isinstance(given, Mapping) or not all(isinstance(name, str) for name in given):
        raise HookOptionError(f"{owner}: hook_options is {given!r}; give a dict of options by name, or None.")
    return dict(given)


def _schedule_of(given: object, owner: str) -> dict[int, str]:
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise HookOptionError(f"{owner}: schedule is {given!r}; give a dict of hooks by step, or None.")
    return dict(given)


def _ranks_of(value: object) -> list[Any]:
    ranks = value.get("ranks") if isinstance(value, dict) else None
    if not isinstance(ranks, list) or not ranks:
        raise CheckpointError("the checkpoint's entry 'commhub' is no hook state that commhub-lightning wrote.")
    return ranks
