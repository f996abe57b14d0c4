"""Bit equality of tensors, here and between ranks: ``==`` lets -0.0 pass for 0.0 and refuses NaN."""

import ctypes
import pickle
from collections.abc import Iterable, Mapping
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")
Tensors = Tensor | Iterable[Tensor] | Mapping[str, Tensor]


def bitwise_equal(a: Tensor, b: Tensor) -> bool:
    """Whether dtype, shape and every bit agree; strides may differ. Sparse tensors are coalesced first."""
    return _frozen(a) == _frozen(b)


def assert_equal_across_ranks(tensors: Tensors, group: dist.ProcessGroup | None = None) -> None:
    """Make sure that the tensors agree bit by bit on all ranks of the group. Collective.

    Raises:
        AssertionError: if they do not, the same on all ranks. It names the first tensor that differs, its first
            element that does, and what each rank has there.
    """
    mine = {name: _frozen(tensor) for name, tensor in _named(tensors).items()}
    everyone = gathered(mine, group)
    first = everyone[0]
    if any(list(theirs) != list(first) for theirs in everyone):
        names = "\n".join(f"rank {rank}: {list(theirs)}" for rank, theirs in enumerate(everyone))
        raise AssertionError(f"the ranks compare different tensors\n{names}")
    for name, (dtype, shape, data) in first.items():
        different = [rank for rank, theirs in enumerate(everyone) if theirs[name] != (dtype, shape, data)]
        if different:
            values = [theirs[name] for theirs in everyone]
            raise AssertionError(f"{name} on rank {', '.join(map(str, different))} differs from rank 0{_where(values)}")


def _named(tensors: Tensors) -> dict[str, Tensor]:
    if isinstance(tensors, Tensor):
        return {"the tensor": tensors}
    if isinstance(tensors, Mapping):
        return dict(tensors)
    return {f"tensor {index}": tensor for index, tensor in enumerate(tensors)}


def _frozen(tensor: Tensor) -> tuple[str, tuple[int, ...], bytes]:
    """Dtype, shape and bytes, comparable and free of NaN's manners."""
    tensor = tensor.detach().cpu()
    if tensor.layout == torch.sparse_coo:
        tensor = tensor.coalesce()
        indices, values = _frozen(tensor.indices()), _frozen(tensor.values())
        return f"sparse {values[0]}", tuple(tensor.shape), indices[2] + values[2]
    data = tensor.resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)
    return str(tensor.dtype), tuple(tensor.shape), _bytes(data)


def _bytes(flat: Tensor) -> bytes:
    """The content of a contiguous uint8 tensor in host memory. NumPy, which may be missing, is not asked."""
    return ctypes.string_at(flat.data_ptr(), flat.numel()) if flat.numel() else b""


def gathered(value: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """Every rank's value, in rank order, without NumPy, which torch's own gathering of objects needs. Collective."""
    device = torch.device("cuda" if dist.get_backend(group) == "nccl" else "cpu")
    mine = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)
    count = dist.get_world_size(group)
    sizes = torch.empty(count, dtype=torch.int64, device=device)
    dist.all_gather_single(sizes, torch.tensor([mine.numel()], device=device), group=group)
    padded = torch.zeros(int(sizes.max()), dtype=torch.uint8)
    padded[: mine.numel()] = mine
    every = torch.empty(count * padded.numel(), dtype=torch.uint8, device=device)
    dist.all_gather_single(every, padded.to(device), group=group)
    rows = zip(every.cpu().view(count, -1), sizes.tolist(), strict=True)
    return [pickle.loads(_bytes(row[:size].contiguous())) for row, size in rows]  # noqa: S301 - from ranks of this test


def _where(values: list[tuple[str, tuple[int, ...], bytes]]) -> str:
    """The first element that differs, with each rank's value of it."""
    kinds = [f"{dtype} {list(shape)}" for dtype, shape, _ in values]
    if len(set(kinds)) > 1 or kinds[0].startswith("sparse"):
        return "".join(f"\nrank {rank}: {kind}" for rank, kind in enumerate(kinds))
    dtype, shape, _ = values[0]
    flat = [torch.frombuffer(bytearray(data), dtype=getattr(torch, dtype[6:])) for *_, data in values]
    size = flat[0].element_size()
    rows = [torch.frombuffer(bytearray(data), dtype=torch.uint8).view(-1, size) for *_, data in values]
    unequal = torch.stack([(row != rows[0]).any(1) for row in rows]).any(0)
    position = int(unequal.nonzero()[0])
    index = [int(i) for i in torch.unravel_index(torch.tensor(position), shape)] if shape else []
    lines = "".join(f"\nrank {rank}: {one[position].item()!r}" for rank, one in enumerate(flat))
    return f" in {int(unequal.sum())} of {len(unequal)} elements, first at {index}{lines}"
