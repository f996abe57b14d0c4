"""Gradients that a hook on a bare module was not prepared for, since they are trained only now."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from commhub._errors import HookError
from commhub.training.steps._between import Between
from commhub.training.steps._text import Entry, TextGather, difference

from ._packing import pack, sparse_in

if TYPE_CHECKING:
    from collections.abc import Iterable

    import torch
    from torch import Tensor, nn

    from commhub.training._trained import Named, Trained
    from commhub.training.steps._engine import Engine

    from ._packing import Packed

logger = logging.getLogger("commhub")


class Unprepared:
    """The parameters that a module trains now and the hook was not prepared for: a plain mean serves them.

    Ranks compare theirs when a rank's have changed, which it says in the round that begins every step.

    Args:
        trained, module: whose parameters.
        prepared: those that the hook was prepared for.

    Attributes:
        buckets, sparse: those that all ranks have, as they are reduced.
    """

    def __init__(self, trained: Trained, module: nn.Module, prepared: Iterable[Named]) -> None:
        self._trained, self._module = trained, module
        self._prepared = {id(p): Entry.of("parameter", name, p) for name, p in prepared}
        self._agreed: tuple[Entry, ...] = ()
        self._mine: dict[Entry, nn.Parameter] = {}
        self._packed: list[nn.Parameter] = []
        self.buckets: list[Packed] = []
        self.sparse: list[Named] = []

    def knows(self, parameter: Tensor) -> bool:
        """Whether the hook was prepared for this parameter, and it has the shape and dtype that it had."""
        entry = self._prepared.get(id(parameter))
        return entry is not None and (tuple(parameter.shape), parameter.dtype) == (entry.shape, entry.dtype)

    def look(self) -> tuple[list[nn.Parameter | None], bool]:
        """This rank's own of what all ranks have, in an order that is the same everywhere; whether that has changed."""
        late = [(name, p) for name, p in self._trained.look() if not self.knows(p)]
        sparse = sparse_in(self._module) if late else set()
        self._mine = {Entry.of("sparse" if id(p) in sparse else "parameter", name, p): p for name, p in late}
        return [self._mine.get(entry) for entry in self._agreed], self._mine.keys() != set(self._agreed)

    def agree(self, engine: Engine, device: torch.device) -> HookError | None:
        """Compare with the other ranks; collective. Return what went wrong, on all of them."""
        told = TextGather(map(str, self._mine))
        failure = Between(engine, engine.step).tell(told, device)
        if failure is not None:
            return failure
        differing = difference(told.everyone, range(engine.world_size))
        if differing:
            return HookError(
                f"{type(engine.hook).__name__}, step {engine.step}, rank {engine.rank}: since registration the ranks "
                f"have come to train different parameters: {differing}. Unfreeze, add and replace them on all ranks "
                "alike."
            )
        words, former = {str(entry): entry for entry in self._mine}, set(self._agreed)
        self._agreed = tuple(words[word] for word in told.everyone[0])
        come = [entry.name for entry in self._agreed if entry not in former]
        if come and engine.rank == 0:
            logger.warning(
                "step %d: %s came to be trained after the hook was registered: until the next swap() or registration "
                "their gradients are averaged by a plain mean.",
                engine.step,
                ", ".join(map(repr, come)),
            )
        return None

    def pack(self) -> None:
        """Have ``buckets`` and ``sparse`` be of what all ranks have now."""
        tensors = [self._mine[entry] for entry in self._agreed]
        if len(tensors) != len(self._packed) or any(a is not b for a, b in zip(tensors, self._packed, strict=True)):
            self._packed = tensors
            self.buckets = pack([(e.name, self._mine[e]) for e in self._agreed if e.kind != "sparse"])
            self.sparse = [(e.name, self._mine[e]) for e in self._agreed if e.kind == "sparse"]
