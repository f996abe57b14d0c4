"""``CommHubDDPStrategy``, as a part that is joined to the ``DDPStrategy`` of either package."""

from __future__ import annotations

import difflib
import inspect
from typing import TYPE_CHECKING, Any

from torch.nn.parallel import DistributedDataParallel

from commhub import HookOptionError

from ._hooked import Hooked

if TYPE_CHECKING:
    from collections.abc import Mapping

    import commhub

OWN_HOOK = ("ddp_comm_hook", "ddp_comm_state", "ddp_comm_wrapper", "model_averaging_period")
"""The arguments by which Lightning's ``DDPStrategy`` registers a hook of PyTorch's."""


class HookedStrategy:
    """Train with DistributedDataParallel, gradients averaged by a commhub hook, on any device.

    The hook is registered after Lightning has made the optimizers, which are passed on with the scaler of the precision
    plugin. Every rank's hook state is part of Lightning's checkpoints and is restored from them.

    Args:
        hook: a name, a hook string such as ``"powersgd(rank=4)"``, a ``commhub.HookType`` member, or a hook object.
        hook_options: the hook's options, and ``wire``, ``timeout``, ``verify`` or ``process_group`` of
            ``commhub.register``.
        schedule: which hooks follow, by step, as for ``Registration.schedule``; a run that is resumed has the one due.
        save_state: put hook state into checkpoints. Rank 0 holds every rank's for a moment then.
        load_state: take it from the checkpoint that a fit begins with; without it the hook begins anew.
        ddp_kwargs: as for Lightning's ``DDPStrategy``.

    Raises:
        UnknownHookError, HookConflictError, PluginError, HookOptionError: the hook cannot be had, or an argument is
            unknown.
    """

    def __init__(
        self,
        hook: object,
        hook_options: Mapping[str, Any] | None = None,
        *,
        schedule: Mapping[int, str] | None = None,
        save_state: bool = True,
        load_state: bool = True,
        **ddp_kwargs: Any,
    ) -> None:
        self._check_arguments(ddp_kwargs)
        self._commhub = Hooked(
            type(self).__name__, hook, hook_options, schedule=schedule, save_state=save_state, load_state=load_state
        )
        super().__init__(**ddp_kwargs)

    @property
    def registration(self) -> commhub.Registration | None:
        """The hook at work, from the beginning of a fit on; ``None`` before."""
        return self._commhub.registration

    def setup(self, trainer: Any) -> None:
        """Wrap the model, make the optimizers, and register the hook."""
        fits = trainer.state.fn == "fit"
        if fits:
            self._commhub.release()
            self._commhub.refuse(trainer)
        else:
            self._commhub.forget()
        super().setup(trainer)  # type: ignore[misc]
        if fits:
            self._commhub.attach(trainer)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> Any:
        """Read a checkpoint, and remember the hook state in it until the model is wrapped."""
        checkpoint = super().load_checkpoint(checkpoint_path, weights_only=weights_only)  # type: ignore[misc]
        self._commhub.take(checkpoint, self)
        return checkpoint

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Write a checkpoint with every rank's hook state, unless it is to have nothing but weights; collective."""
        if "optimizer_states" in checkpoint:
            # Where a launcher has trained in processes that it started, the module has no trainer here afterwards.
            self._commhub.put(checkpoint, self.lightning_module._trainer)  # type: ignore[attr-defined]
        super().save_checkpoint(checkpoint, filepath, storage_options=storage_options)  # type: ignore[misc]

    def _check_arguments(self, given: dict[str, Any]) -> None:
        owner = type(self).__name__
        if hooks := [name for name in OWN_HOOK if given.get(name) is not None]:
            raise HookOptionError(f"{owner} takes no {hooks[0]}=: DDP has room for one hook. Give it as hook=.")
        above = type(self).__mro__[type(self).__mro__.index(HookedStrategy) + 1]
        known = {*inspect.signature(above).parameters, *inspect.signature(DistributedDataParallel).parameters}
        for name in sorted(given.keys() - (known - {"kwargs", "module"})):
            near = difflib.get_close_matches(name, [*known, "hook_options"], 1)
            hint = f" Did you mean {near[0]}=?" if near else ""
            raise HookOptionError(
                f"{owner}: {name!r} is no argument of DDPStrategy or DistributedDataParallel.{hint} Options of the "
                "hook belong in hook_options={...} or in the hook string."
            )
