"""A model's own step: its buckets, when each of them is ready, and how long all takes without communication."""

from __future__ import annotations

import statistics
import time
from typing import TYPE_CHECKING

import attrs
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor, nn

    from commhub.protocol._bucket import Bucket
    from commhub.protocol._hook import Exchange

_WARM_UP = 3
"""Steps until DDP has laid its buckets out in the order in which backward fills them."""


@attrs.frozen(kw_only=True)
class Ready:
    """One bucket.

    Attributes:
        shapes: of its gradients.
        dtype: theirs.
        seconds: from the step's beginning until it is ready; median over steps.
    """

    shapes: tuple[tuple[int, ...], ...]
    dtype: torch.dtype
    seconds: float

    @property
    def numel(self) -> int:
        """The elements of all its gradients."""
        return sum(torch.Size(shape).numel() for shape in self.shapes)


@attrs.frozen(kw_only=True)
class Backward:
    """A step without communication.

    Attributes:
        buckets: in the order in which they are ready.
        seconds: forward and backward; median over steps, mean of the ranks.
    """

    buckets: tuple[Ready, ...]
    seconds: float


def observe(
    module: nn.Module,
    inputs: Sequence[object],
    group: dist.ProcessGroup | None = None,
    *,
    bucket_cap_mb: float | None = None,
    steps: int = 7,
) -> Backward:
    """Take some steps with a hook that sends nothing, on all ranks at the same time. Collective.

    Args:
        module: to be wrapped in DDP; its gradients are cleared in the end.
        inputs: of ``module``, whose result's mean of squares is the loss, unless it is a scalar.
        group: the ranks that compute at the same time; default: all.
        bucket_cap_mb: DDP's.
        steps: how many are measured.
    """
    import commhub

    device = next(module.parameters()).device
    ids = [device.index] if device.type == "cuda" else None
    model = DistributedDataParallel(
        module, device_ids=ids, process_group=group, bucket_cap_mb=bucket_cap_mb, init_sync=False
    )
    registration = commhub.register(model, _Silent())
    shapes = {name: (tuple(each.shape), each.dtype) for name, each in model.module.named_parameters()}
    took: list[float] = []
    ready: list[list[float]] = []
    names: list[tuple[str, ...]] = []
    try:
        for step in range(_WARM_UP + steps):
            dist.barrier(group)
            module.zero_grad(set_to_none=True)
            began = time.monotonic()
            loss_of(model(*inputs)).backward()
            ended = time.monotonic()
            if step < _WARM_UP:
                continue
            buckets = [each for each in registration.timeline()[-1].buckets if each.purpose == "gradients"]
            took.append(ended - began)
            ready.append([each.ready - began for each in buckets])
            names = [each.names for each in buckets]
    finally:
        registration.remove()
        module.zero_grad(set_to_none=True)
    means = torch.tensor(
        [statistics.median(took), *map(statistics.median, zip(*ready, strict=True))], dtype=torch.float64
    )
    dist.all_reduce(means, group=group)
    seconds, *each_ready = (means / dist.get_world_size(group)).tolist()
    made = []
    for own, at in zip(names, each_ready, strict=True):
        known = [shapes[name.removeprefix("module.")] for name in own]
        made.append(Ready(shapes=tuple(shape for shape, _ in known), dtype=known[0][1], seconds=at))
    return Backward(buckets=tuple(made), seconds=seconds)


def loss_of(result: object) -> Tensor:
    """What backward begins with: the result if it is a scalar, else the mean of its squares.

    Raises:
        TypeError: if it is no tensor.
    """
    if not isinstance(result, torch.Tensor):
        raise TypeError(f"the model returned {type(result).__name__}; a step needs a tensor")
    return result if result.dim() == 0 else result.square().mean()


class _Silent:
    """Leaves each rank its own gradients."""

    def reduce(self, bucket: Bucket) -> Exchange:  # noqa: ARG002 - they stay as they are
        """Ask for nothing."""
        yield from ()
