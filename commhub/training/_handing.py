"""Exchanges that leave tensors and optimizers' state the same on all ranks, bit by bit."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch

from commhub.protocol._collectives import AllReduce, Broadcast
from commhub.training.averaging._averaging import chunks
from commhub.training.steps._text import TextGather

from ._trained import local

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from commhub.protocol._bucket import Bucket
    from commhub.protocol._hook import Exchange

    Tensors = Sequence[tuple[str, Tensor]]


class Mean:
    """Leaves the mean over the ranks in floating-point and complex tensors, which are as many on all of them."""

    def __init__(self, tensors: Tensors) -> None:
        self._tensors = [(name, t) for name, t in tensors if t.is_floating_point() or t.is_complex()]

    def reduce(self, bucket: Bucket) -> Exchange:  # noqa: ARG002 - it plays no part
        """Average them, and write nothing before all have come."""
        means = []
        for chunk in chunks(self._tensors):
            flat = torch.cat([tensor.detach().reshape(-1) for _, tensor in chunk])
            means.append((chunk, (yield AllReduce(flat, wire=torch.float64))))
        for chunk, mean in means:
            _scatter(chunk, mean)


class Handed:
    """Leaves in tensors what they are on one rank; ``changed`` is how many of this rank's were different.

    Args:
        source: the rank.
        tensors: as many on all ranks, of the same shapes and dtypes.
    """

    def __init__(self, source: int, tensors: Tensors) -> None:
        self.changed = 0
        self._source, self._tensors = source, [(name, local(tensor)) for name, tensor in tensors]

    def reduce(self, bucket: Bucket) -> Exchange:
        """Send them as bytes, and write nothing before all have come."""
        received = []
        for chunk in chunks(self._tensors):
            flat = torch.cat([tensor.detach().reshape(-1).to(bucket.flat.device) for _, tensor in chunk])
            mine = flat.view(torch.uint8) if bucket.rank == self._source else torch.empty_like(flat).view(torch.uint8)
            if not mine.numel():
                continue
            theirs = yield Broadcast(mine, src=self._source)
            if bucket.rank != self._source:
                received.append((chunk, theirs.view(flat.dtype)))
        for chunk, theirs in received:
            self.changed += _scatter(chunk, theirs)


class StateHanded:
    """Leaves in optimizers the state that they have on one rank: tensors, and what JSON can say.

    Args:
        source: the rank.
        parameters: by name; the state of others is left alone.
        optimizers: as many on all ranks.
    """

    def __init__(self, source: int, parameters: Tensors, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        self._source, self._parameters, self._optimizers = source, dict(parameters), optimizers

    def reduce(self, bucket: Bucket) -> Exchange:
        """Say what there is, then send the tensors."""
        told = TextGather(self._described())
        yield from told.reduce(bucket)
        tensors: list[tuple[str, Tensor]] = []
        tables: list[tuple[Any, Tensor, dict[str, Any]]] = []
        for line in told.everyone[self._source]:
            number, name, entries = json.loads(line)
            parameter = self._parameters[name]
            optimizer: Any = self._optimizers[number] if number < len(self._optimizers) else None
            kept = {} if optimizer is None else optimizer.state.get(parameter, {})
            table = {key: value for key, value in kept.items() if not _can_be_said(value)}
            for key, kind, value in entries:
                table[key] = value if kind == "plain" else _like(kind, value, kept.get(key), parameter)
                if kind != "plain":
                    tensors.append((f"{name}:{key}", table[key]))
            tables.append((optimizer, parameter, table))
        yield from Handed(self._source, tensors).reduce(bucket)
        if bucket.rank != self._source:
            self._take(tables)

    def _described(self) -> list[str]:
        lines = []
        for number, optimizer in enumerate(self._optimizers):
            for name, parameter in self._parameters.items():
                entries: list[tuple[str, str, Any]] = []
                for key, value in optimizer.state.get(parameter, {}).items():
                    if isinstance(value, torch.Tensor):
                        kind = f"{str(value.dtype).removeprefix('torch.')} {value.device.type}"
                        entries.append((key, kind, list(value.shape)))
                    elif _can_be_said(value):
                        entries.append((key, "plain", value))
                if entries:
                    lines.append(json.dumps([number, name, entries]))
        return lines

    def _take(self, tables: list[tuple[Any, Tensor, dict[str, Any]]]) -> None:
        for optimizer in self._optimizers:
            for parameter in self._parameters.values():
                optimizer.state.pop(parameter, None)
        for optimizer, parameter, table in tables:
            if optimizer is not None:
                optimizer.state[parameter] = table


def _can_be_said(value: object) -> bool:
    """Whether a rank can hand it to another; what it cannot, such as a list, stays each rank's own."""
    return isinstance(value, torch.Tensor | bool | int | float | str | None)


def _like(kind: str, shape: list[int], kept: object, parameter: Tensor) -> Tensor:
    """A tensor to receive into: the one that is kept, where it fits, since others may refer to it."""
    name, device = kind.split()
    dtype: torch.dtype = getattr(torch, name)
    if isinstance(kept, torch.Tensor) and (list(kept.shape), kept.dtype) == (shape, dtype):
        return kept
    where = parameter.device if device == parameter.device.type else torch.device(device)
    if shape == list(parameter.shape):
        return torch.empty_like(parameter, dtype=dtype, device=where, requires_grad=False)
    return torch.empty(shape, dtype=dtype, device=where)


def _scatter(tensors: Tensors, flat: Tensor) -> int:
    """Write the parts of ``flat`` into the tensors; return how many were different, bit by bit."""
    changed = 0
    for (_, tensor), part in zip(tensors, flat.split([t.numel() for _, t in tensors]), strict=True):
        new = part.view(tensor.shape).to(tensor.device)
        if not torch.equal(_bits(tensor), _bits(new)):
            tensor.copy_(new)
            changed += 1
    return changed


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)
