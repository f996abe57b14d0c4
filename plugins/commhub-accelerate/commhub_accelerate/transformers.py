"""commhub's hooks in the Trainer of Transformers: ``attach(trainer, "powersgd_rank2")`` before ``train``.

The Trainer holds an accelerator, to which the hook is attached. Its callbacks are not told where a checkpoint is
written, nor from which one it resumes; two of its methods are, on every rank, and are called by way of
``TrainerAttached``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import commhub
from commhub import RegistrationError

from . import _attach, _state
from ._around import around
from ._framework import require
from ._refusals import checked_schedule, refuse_options
from ._served import ddp_in

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from commhub import Registration

__all__ = ["TrainerAttached", "attach"]


def attach(trainer: Any, hook: object, *, schedule: Mapping[int, str] | None = None, **options: Any) -> TrainerAttached:
    """Have ``trainer`` average gradients with ``hook``; call it before ``train``.

    What the hook remembers on every rank is saved in ``checkpoint-N/commhub``, and read from there on
    ``train(resume_from_checkpoint=...)``. With ``save_only_model=True`` it is left out like the optimizer's state.

    Args:
        trainer: a ``transformers.Trainer``, or an object of a class derived from it.
        hook, schedule, options: as for ``commhub_accelerate.attach``.

    Raises:
        UnknownHookError, HookConflictError, PluginError, HookOptionError: the hook cannot be had.
        PluginError: Accelerate or Transformers is not installed, or of a version that is not known here.
        RegistrationError: the trainer has trained or evaluated, has a hook already, wraps no model in DDP, or clips
            gradients that the hook has used by then.

    >>> attached = attach(trainer, "powersgd_rank2")  # doctest: +SKIP
    """
    kind = require("transformers").Trainer
    refuse_options(options)
    hooks = [commhub.checked(hook, **options), *map(commhub.checked, checked_schedule(schedule).values())]
    if not isinstance(trainer, kind):
        raise RegistrationError(f"{type(trainer).__name__} is no transformers.Trainer.")
    early = next((made.made[0] for made in hooks if getattr(made, "steps_optimizer", False)), None)
    if early is not None and trainer.args.max_grad_norm > 0:
        raise RegistrationError(
            f"{early} steps the optimizer in backward, and the Trainer clips gradients after it, to "
            f"max_grad_norm={trainer.args.max_grad_norm}: too late to count. Give "
            "TrainingArguments(max_grad_norm=0), or take a hook that leaves the step to the optimizer."
        )
    return TrainerAttached(trainer, hook, {**options, "schedule": schedule}, early=early is not None)


class TrainerAttached:
    """A hook attached to a Trainer. ``attach`` makes it."""

    def __init__(self, trainer: Any, hook: object, options: dict[str, Any], *, early: bool) -> None:
        self._trainer = trainer
        self._hook, self._options = hook, options
        self._attached = _attach.attach(trainer.accelerator, hook, **options)
        around(trainer, "create_accelerator_and_postprocess", self._create_accelerator)
        around(trainer, "_save_rng_state", self._save)
        around(trainer, "_load_optimizer_and_scheduler", self._load)
        if early:
            around(trainer, "_get_grad_norm", _grad_norm)

    def __str__(self) -> str:
        return str(self._attached)

    @property
    def registration(self) -> Registration | None:
        """The registration on the Trainer's model; ``None`` until ``train`` has wrapped it, and in a single process."""
        model = ddp_in(self._trainer.model_wrapped)
        return None if model is None else commhub.registration(model)

    def _create_accelerator(self, method: Callable[[], None]) -> None:
        """A search of hyperparameters makes a new accelerator for each trial."""
        method()
        if _attach.KEY not in vars(self._trainer.accelerator):
            self._attached = _attach.attach(self._trainer.accelerator, self._hook, **self._options)

    def _save(self, method: Callable[..., None], output_dir: str) -> None:
        method(output_dir)
        registration = self.registration
        if registration is not None:
            registration.save(_state.folder(output_dir))

    def _load(self, method: Callable[..., None], checkpoint: str | None) -> None:
        method(checkpoint)
        self._attached.settle()
        registration = self.registration
        if checkpoint is not None and registration is not None:
            speaks = bool(self._trainer.accelerator.is_main_process)
            _state.load(registration, _state.folder(checkpoint), speaks=speaks)


def _grad_norm(method: Callable[..., Any], model: Any, grad_norm: Any = None) -> Any:
    """The norm for the log. The Trainer's own way multiplies the gradients by 1, which to the hook is a change."""
    if grad_norm is not None:
        return method(model, grad_norm=grad_norm)
    import torch

    return torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
