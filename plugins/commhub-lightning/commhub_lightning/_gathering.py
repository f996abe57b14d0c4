"""Every rank's hook state on rank 0, whole, for the one file that Lightning writes.

Nothing is unpickled that comes from another rank but plain tensors, numbers and strings.
"""

from __future__ import annotations

import io
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from commhub import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

PATIENCE = 30.0
"""Seconds for which ranks wait for each other where some may have failed alone."""

PIECE = 64 * 2**20
"""Bytes that travel at once, so that a device holds no more of the states than that."""


def all_come() -> bool:
    """Whether every rank calls this within ``PATIENCE``; on NCCL, which cannot tell, it takes that for granted."""
    if not dist.is_initialized() or "gloo" not in dist.get_backend():
        return True
    try:
        dist.monitored_barrier(timeout=timedelta(seconds=PATIENCE))
    except RuntimeError:
        return False
    return True


def gather(state: Callable[[], dict[str, Any]], device: torch.device) -> list[dict[str, Any]] | None:
    """Each rank's ``state()``, in their order, on rank 0; ``None`` on the others; collective over all ranks.

    What ranks have alike is held once, so that a file that it is saved to holds it once too. The tensors are copies,
    in host memory.

    Args:
        state: gives this rank's, which ``torch.load(weights_only=True)`` can read.
        device: through which tensors travel: one that the default process group serves.

    Raises:
        CheckpointError: on all ranks, if ``state`` raised on any, where its error is the cause; on those that wait for
            a rank that is gone.
    """
    try:
        return _gathered(state, device)
    except RuntimeError as error:
        raise CheckpointError(
            f"the hook's state cannot be saved: a rank was lost on the way, or did not save: {error}"
        ) from error


def _gathered(state: Callable[[], dict[str, Any]], device: torch.device) -> list[dict[str, Any]] | None:
    failure: Exception | None = None
    packed = torch.empty(0, dtype=torch.uint8)
    try:
        packed = _packed(state())
    except Exception as error:  # noqa: BLE001 - it is raised again, after the peers were told
        failure = error
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    sizes = _sizes(-1 if failure is not None else packed.numel(), size, device)
    if failed := [peer for peer, length in enumerate(sizes) if length < 0]:
        text = f"the hook's state on rank {', '.join(map(str, failed))} cannot be saved"
        raise CheckpointError(f"{text}: {failure}" if failure is not None else f"{text}.") from failure
    if rank != 0:
        _send(packed, device)
        return None
    gathered = [_unpacked(packed)]
    for peer in range(1, size):
        gathered.append(_shared(_unpacked(_received(peer, sizes[peer], device)), gathered[0]))
    return gathered


def _packed(state: dict[str, Any]) -> Tensor:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return torch.frombuffer(bytearray(buffer.getbuffer()), dtype=torch.uint8)


def _unpacked(packed: Tensor) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(io.BytesIO(packed.numpy().tobytes()), map_location="cpu", weights_only=True)
    return state


def _sizes(own: int, size: int, device: torch.device) -> list[int]:
    if size == 1:
        return [own]
    sizes = [torch.empty(1, dtype=torch.int64, device=device) for _ in range(size)]
    dist.all_gather(sizes, torch.tensor([own], dtype=torch.int64, device=device))
    return [int(one) for one in sizes]


def _send(packed: Tensor, device: torch.device) -> None:
    for piece in packed.split(PIECE):
        dist.send(piece.to(device), dst=0)


def _received(peer: int, length: int, device: torch.device) -> Tensor:
    packed = torch.empty(length, dtype=torch.uint8)
    for piece in packed.split(PIECE):
        arrived = torch.empty_like(piece, device=device)
        dist.recv(arrived, src=peer)
        piece.copy_(arrived)
    return packed


def _shared(value: Any, known: Any) -> Any:
    """``value``, with the tensors of ``known`` where they are the same, byte by byte."""
    if isinstance(value, dict) and isinstance(known, dict):
        return {key: _shared(one, known.get(key)) for key, one in value.items()}
    if isinstance(value, torch.Tensor) and isinstance(known, torch.Tensor) and _is_same(value, known):
        return known
    return value


def _is_same(one: Tensor, other: Tensor) -> bool:
    if (one.dtype, one.shape, one.stride()) != (other.dtype, other.shape, other.stride()):
        return False
    ours, theirs = (tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other))
    return torch.equal(ours, theirs)
