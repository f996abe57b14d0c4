"""What the updates of one step have overwritten, so that the step can be taken back where it counts nowhere."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs
import torch

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor


@attrs.define(eq=False)
class _Before:
    """A parameter, its master if it has one, and its optimizer's state, as they were.

    Attributes:
        optimizer: in whose state it is.
        parameter: which.
        master: its own, or ``None``.
        values: copies of both, in the memory of the step before.
        state: copies of the state; ``None`` where there was none.
    """

    optimizer: torch.optim.Optimizer
    parameter: Tensor
    master: Tensor | None
    values: list[Tensor] = attrs.Factory(list)
    state: dict[str, Any] | None = None

    def keep(self) -> None:
        state = self.optimizer.state.get(self.parameter)
        former = self.state or {}
        self.values = [_copy(now, kept) for now, kept in _beside(self._tensors(), self.values)]
        self.state = None if state is None else {key: _copy(value, former.get(key)) for key, value in state.items()}

    def restore(self) -> None:
        for tensor, value in zip(self._tensors(), self.values, strict=True):
            tensor.copy_(value)
        if self.state is None:
            self.optimizer.state.pop(self.parameter, None)
            return
        table = self.optimizer.state[self.parameter]
        former = dict(table)
        table.clear()
        table.update((key, _copy(value, former.get(key))) for key, value in self.state.items())

    def _tensors(self) -> list[Tensor]:
        return [tensor for tensor in (self.parameter.detach(), self.master) if tensor is not None]


class Undo:
    """The memory of one hook: it grows to the parameters and their state, and is used again in each step."""

    def __init__(self) -> None:
        self._step = -1
        self._every: dict[int, _Before] = {}
        self._noted: dict[int, _Before] = {}

    def note(
        self, step: int, optimizer: torch.optim.Optimizer, updated: Sequence[tuple[Tensor, Tensor | None]]
    ) -> None:
        """Keep parameters, masters and state as they are; what was noted in an earlier step has come to stay."""
        if step != self._step:
            self.forget()
            self._step = step
        for parameter, master in updated:
            if id(parameter) in self._noted:
                continue  # since a backward that failed midway
            before = self._every.get(id(parameter))
            if before is None or before.optimizer is not optimizer or before.master is not master:
                before = self._every[id(parameter)] = _Before(optimizer, parameter, master)
            before.keep()
            self._noted[id(parameter)] = before

    def take_back(self) -> list[Tensor]:
        """Put everything back; return the parameters."""
        with torch.no_grad():
            for before in self._noted.values():
                before.restore()
        parameters = [before.parameter for before in self._noted.values()]
        self.forget()
        return parameters

    def forget(self) -> None:
        """The step counts."""
        self._noted.clear()


def _copy(value: Any, memory: Any) -> Any:
    """A copy of a tensor, in ``memory`` if it fits; what is no tensor is its own copy."""
    if not isinstance(value, torch.Tensor):
        return value
    fits = isinstance(memory, torch.Tensor) and (memory.shape, memory.dtype) == (value.shape, value.dtype)
    return memory.copy_(value) if fits else value.clone()


def _beside(values: Sequence[Tensor], memory: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor | None]]:
    for number, value in enumerate(values):
        yield value, memory[number] if number < len(memory) else None
