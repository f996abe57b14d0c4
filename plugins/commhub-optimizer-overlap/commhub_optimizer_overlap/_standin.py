"""An optimizer's own step, for some of its parameters only."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import attrs

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch
    from torch import Tensor


@attrs.frozen(eq=False)
class Update:
    """A parameter, the number of its group in its optimizer, and the gradient to step it with.

    Attributes:
        group, parameter, gradient: as said.
        master: what to step in the parameter's place, with the parameter's state; the parameter is not written then.
    """

    group: int
    parameter: Tensor
    gradient: Tensor
    master: Tensor | None = None

    @property
    def target(self) -> Tensor:
        """What is stepped."""
        return self.parameter if self.master is None else self.master


def step_some(optimizer: torch.optim.Optimizer, updates: Sequence[Update]) -> None:
    """Step the parameters of ``updates`` and nothing else, with the optimizer's own method, state and settings.

    The method runs on a stand-in that shares everything with the optimizer but its groups, which hold these
    parameters alone, and its hooks, of which there are none. A parameter's ``.grad`` is as before afterwards.
    """
    if not updates:
        return
    stand_in: Any = object.__new__(type(optimizer))
    vars(stand_in).update(vars(optimizer))
    vars(stand_in).pop("step", None)  # a learning-rate scheduler's, which counts the user's own calls
    stand_in._optimizer_step_pre_hooks = OrderedDict()
    stand_in._optimizer_step_post_hooks = OrderedDict()
    stand_in.param_groups = _groups(optimizer, updates)
    kept = [update.target.grad for update in updates]
    try:
        for update in updates:
            _move(optimizer.state, update.parameter, update.target)
            update.target.grad = update.gradient
        _own_step(optimizer)(stand_in)
    finally:
        for update, gradient in zip(updates, kept, strict=True):
            _move(optimizer.state, update.target, update.parameter)
            update.target.grad = gradient
    for name, value in vars(stand_in).items():
        if isinstance(value, bool) and vars(optimizer).get(name) is not value:  # "has checked", "has warned"
            setattr(optimizer, name, value)


def _groups(optimizer: torch.optim.Optimizer, updates: Sequence[Update]) -> list[dict[str, Any]]:
    """Copies of the groups as they are now, so with the present learning rates, cut to the updates' parameters."""
    groups: dict[int, dict[str, Any]] = {}
    for update in updates:
        if update.group not in groups:
            groups[update.group] = {**optimizer.param_groups[update.group], "params": []}
            groups[update.group].pop("param_names", None)
        groups[update.group]["params"].append(update.target)
    return [groups[number] for number in sorted(groups)]


def _move(state: dict[Tensor, Any], source: Tensor, target: Tensor) -> None:
    if target is not source and source in state:
        state[target] = state.pop(source)


def _own_step(optimizer: torch.optim.Optimizer) -> Callable[[object], object]:
    """The class's method, without the wrapper in which PyTorch calls every optimizer's hooks."""
    step: Any = type(optimizer).step
    own: Callable[[object], object] = step.__wrapped__ if getattr(step, "hooked", False) else step
    return own


class Members:
    """Where each parameter stands: by identity, (number of the optimizer, number of the group)."""

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        self._optimizers = optimizers
        self._lengths: list[int] | None = None
        self._places: dict[int, tuple[int, int]] = {}

    def __call__(self) -> dict[int, tuple[int, int]]:
        """The places as they are now; groups may be added at any time."""
        lengths = [len(group["params"]) for optimizer in self._optimizers for group in optimizer.param_groups]
        if lengths != self._lengths:
            self._places = {
                id(parameter): (number, place)
                for number, optimizer in enumerate(self._optimizers)
                for place, group in enumerate(optimizer.param_groups)
                for parameter in group["params"]
            }
            self._lengths = lengths
        return self._places
