"""``PostLocalSGDOptimizer`` with PyTorch's signature: commhub-post-local-sgd's, with an averager of this package."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import commhub_post_local_sgd

import commhub

from ._averagers import ModelAverager

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch


class PostLocalSGDOptimizer(commhub_post_local_sgd.PostLocalSGDOptimizer):
    """Steps like ``optim``, then counts and averages the parameters as ``averager`` says.

    All that commhub-post-local-sgd's does it does too: closures, schedulers, loss scalers, pickling.

    Args:
        optim: takes the local steps.
        averager: a ``PeriodicModelAverager`` or ``HierarchicalModelAverager`` of this package, which nothing else uses.

    Raises:
        HookOptionError: if these are something else.
    """

    averager: ModelAverager

    def __init__(self, optim: torch.optim.Optimizer, averager: ModelAverager) -> None:
        if not isinstance(averager, ModelAverager):
            raise commhub.HookOptionError(
                f"averager is {type(averager).__name__}; give a PeriodicModelAverager or HierarchicalModelAverager of "
                "commhub_compat."
            )
        super().__init__(optim, averager, averager._given)

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take the wrapped optimizer's step, then average the parameters if they are due; as in the base class."""
        if self.averager.step != self.steps:  # the script has set it
            self.steps = self.averager.step
        loss = super().step(closure)
        self.averager.step = self.steps
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from ``state_dict``; one without a ``"step"`` counts from 0 and warns."""
        super().load_state_dict(state_dict)
        self.averager.step = self.steps

    def __repr__(self) -> str:
        return repr(self.optim)
