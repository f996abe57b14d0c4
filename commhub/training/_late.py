"""Gradients that a hook on a bare module was not prepared for, since they are trained only now."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import attrs
import torch
from torch import nn

from commhub._errors import HookError
from commhub.protocol._bucket import lay_out
from commhub.protocol._nesting import Confined

from ._told import Entry, Told, difference

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch import Tensor

    from commhub.protocol._bucket import Span

    from ._engine import Engine
    from ._trained import Named, Trained

logger = logging.getLogger("commhub")

BUCKET_BYTES = 25 * 2**20
"""The size at which a bucket is full, DDP's own default."""


@attrs.frozen(eq=False)
class Packed:
    """The parameters of one bucket, and how their gradients lie in it."""

    parameters: tuple[Tensor, ...]
    spans: tuple[Span, ...]
    dtype: torch.dtype

    def empty(self, device: torch.device) -> tuple[Tensor, list[Tensor]]:
        """A bucket of zeros, and views of it, one for each parameter."""
        flat = torch.zeros(sum(s.numel for s in self.spans), dtype=self.dtype, device=device)
        return flat, [flat.as_strided(s.shape, s.stride, s.offset) for s in self.spans]


class Late:
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
        told = Told(map(str, self._mine))
        bucket = engine.bucket(torch.zeros(1, device=device), (), ())
        failure = engine.aside(Confined(told, None), [bucket], None, counted=False)
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


def sparse_in(module: nn.Module) -> set[int]:
    """The parameters whose gradients are sparse, by identity, told as DDP tells them."""
    kinds = (nn.Embedding, nn.EmbeddingBag)
    return {id(m.weight) for m in module.modules() if isinstance(m, kinds) and m.sparse}


def pack(parameters: Sequence[Named]) -> list[Packed]:
    """Buckets of one dtype each, last parameters first, as backward makes their gradients."""
    buckets: list[list[tuple[str, Tensor]]] = []
    size = 0
    for name, parameter in reversed(parameters):
        fits = buckets and size + parameter.nbytes <= BUCKET_BYTES and buckets[-1][0][1].dtype == parameter.dtype
        if not fits:
            buckets.append([])
            size = 0
        buckets[-1].append((name, parameter))
        size += parameter.nbytes
    made = []
    for bucket in buckets:
        names, tensors = zip(*bucket, strict=True)
        made.append(Packed(tensors, lay_out(names, tensors), tensors[0].dtype))
    return made
