"""Averaging parameters with an averager's exchange: in place, in chunks, in an order that is the same on every rank."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs
import torch
from torch import Tensor

from ._bucket import lay_out
from ._collectives import AllGather, AllReduce
from ._protocols import Confined

if TYPE_CHECKING:
    import weakref
    from collections.abc import Iterator, Sequence

    from ._bucket import Bucket
    from ._collectives import Subgroup
    from ._engine import Engine
    from ._errors import HookError
    from ._protocols import Averager, Exchange

CHUNK = 8 * 2**20
"""Bytes of one bucket of parameters; a parameter that is larger has a bucket to itself."""
AHEAD = 4
"""Buckets in memory at a time."""

Named = tuple[str, Tensor]


@attrs.define(eq=False, kw_only=True)
class Averaging:
    """What an averager works on.

    Attributes:
        averager: whose exchange it is.
        engine: carries the exchange out.
        parameters, buffers: by name, in the model's order.
        optimizers: whose state may be averaged too.
    """

    averager: Averager
    engine: weakref.ref[Engine]
    parameters: Sequence[Named]
    buffers: Sequence[Named]
    optimizers: Sequence[torch.optim.Optimizer]
    _common: dict[Subgroup | None, tuple[frozenset[str], frozenset[str]]] = attrs.Factory(dict)

    @property
    def optimizer_state(self) -> bool:
        """Whether the averager asks for the optimizers' state."""
        return bool(getattr(self.averager, "optimizer_state", False))

    def __call__(self, step: int, group: Subgroup | None) -> HookError | None:
        """Average everything among ``group``, all ranks where it is ``None``; return what went wrong."""
        engine = self.engine()
        assert engine is not None
        with torch.no_grad():
            kinds = [list(self.parameters)]
            if getattr(self.averager, "buffers", False):
                kinds.append([(name, b) for name, b in self.buffers if b.is_floating_point() or b.is_complex()])
            if self.optimizer_state:
                kinds.append(self._optimizer_state(engine, step, group))
            chunks = [chunk for tensors in kinds for chunk in _chunks(tensors)]
            hook = Confined(self.averager, group)
            engine.state.begin()
            finite, forgets = True, engine.state.is_empty()
            for start in range(0, len(chunks), AHEAD):
                filled: list[tuple[Bucket, list[Named]]] = []
                some = _fill(engine, chunks[start : start + AHEAD], start, step, group, filled)
                failure = engine.aside(hook, some, group)
                if failure is not None:
                    engine.state.rollback()
                    return failure
                for bucket, chunk in filled:
                    finite = finite and (forgets or bool(bucket.finite))
                    for view, (_, tensor) in zip(bucket.gradients, chunk, strict=True):
                        tensor.copy_(view)
            engine.state.commit(finite)
        return None

    def _optimizer_state(self, engine: Engine, step: int, group: Subgroup | None) -> list[Named]:
        """The tensors that every rank of the group has. A rank whose optimizer never stepped has none yet."""
        found: dict[str, Tensor] = {}
        for name, parameter in self.parameters:
            for number, optimizer in enumerate(self.optimizers):
                table: dict[str, Any] = optimizer.state.get(parameter, {})
                for key, value in sorted(table.items()):
                    fits = isinstance(value, Tensor) and value.shape == parameter.shape and value.is_floating_point()
                    if fits and key != "step":
                        found[f"{name}:{key}" if number == 0 else f"{name}:{number}:{key}"] = value
        mine = frozenset(f"{name} {tensor.dtype}" for name, tensor in found.items())
        told = _Common(mine, self._common.get(group))
        flag = torch.zeros(1, device=self.parameters[0][1].device)
        bucket = engine.bucket(flag, (), (), step=step, group=group)
        failure = engine.aside(Confined(told, group), [bucket], group, topic="what every rank has")
        if failure is None:
            self._common[group] = mine, told.common
        return [(name, tensor) for name, tensor in found.items() if f"{name} {tensor.dtype}" in told.common]


class _Common:
    """The words that all ranks have: gathered where any rank's have changed since they were, else as they were."""

    def __init__(self, mine: frozenset[str], known: tuple[frozenset[str], frozenset[str]] | None) -> None:
        self._mine = mine
        self._changed = known is None or known[0] != mine
        self.common = frozenset() if known is None else known[1]

    def reduce(self, bucket: Bucket) -> Exchange:
        changed = yield AllReduce(bucket.flat.fill_(float(self._changed)), op="sum")
        if float(changed) == 0:
            return
        device = bucket.flat.device
        text = "\n".join(sorted(self._mine)).encode()
        lengths = (yield AllGather(torch.tensor([len(text)], device=device))).tolist()
        padded = torch.zeros(max(*lengths, 1), dtype=torch.uint8)
        padded[: len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8) if text else padded[:0]
        gathered = (yield AllGather(padded.to(device))).cpu().view(len(lengths), -1)
        everyone = [bytes(row[:n].tolist()).decode().split("\n") for row, n in zip(gathered, lengths, strict=True)]
        self.common = frozenset.intersection(*(frozenset(words) - {""} for words in everyone))


def _fill(
    engine: Engine,
    chunks: Sequence[list[Named]],
    first: int,
    step: int,
    group: Subgroup | None,
    filled: list[tuple[Bucket, list[Named]]],
) -> Iterator[Bucket]:
    """Buckets with copies of the chunks' tensors, each also noted in ``filled``."""
    for index, chunk in enumerate(chunks, start=first):
        names, tensors = [name for name, _ in chunk], [tensor for _, tensor in chunk]
        spans = lay_out(names, tensors)
        flat = tensors[0].new_empty(sum(span.numel for span in spans))
        bucket = engine.bucket(flat, tensors, spans, index=index, step=step, group=group)
        for view, tensor in zip(bucket.gradients, tensors, strict=True):
            view.copy_(tensor)
        filled.append((bucket, chunk))
        yield bucket


def _chunks(tensors: Sequence[Named]) -> Iterator[list[Named]]:
    """One dtype each, in the given order, up to CHUNK bytes."""
    by_dtype: dict[torch.dtype, list[Named]] = {}
    for name, tensor in tensors:
        by_dtype.setdefault(tensor.dtype, []).append((name, tensor))
    for same in by_dtype.values():
        chunk: list[Named] = []
        size = 0
        for name, tensor in same:
            if chunk and size + tensor.nbytes > CHUNK:
                yield chunk
                chunk, size = [], 0
            chunk.append((name, tensor))
            size += tensor.nbytes
        yield chunk
