"""Small deterministic models, and a training loop that keeps everything a test may want to compare."""

import itertools
from collections.abc import Callable, Sequence
from typing import TypeVar

import attrs
import torch
import torch.distributed as dist
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)

Batch = Callable[[int, int], tuple[Tensor, ...]]
"""(rank, step) -> what the model is called with."""


def mlp(widths: Sequence[int] = (8, 16, 4), seed: int = 0) -> nn.Sequential:
    """Linear layers of these widths with tanh between them; the same on every rank for one seed.

    ``mlp([16] * 13)`` has 12 layers of 1 KiB, and ``DistributedDataParallel(..., bucket_cap_mb=1 / 1024)`` makes
    12 buckets of it, from the second step on.
    """
    layers: list[nn.Module] = []
    for inner, outer in itertools.pairwise(widths):
        layers += [_linear(inner, outer), nn.Tanh()]
    return _seeded(nn.Sequential(*layers[:-1]), seed)


class Branches(nn.Module):
    """Two branches, of which ``forward`` uses the first only, unless told to use both."""

    def __init__(self, width: int = 8, seed: int = 0) -> None:
        super().__init__()
        self.used = _linear(width, width)
        self.unused = _linear(width, width)
        _seeded(self, seed)

    def forward(self, x: Tensor, both: bool = False) -> Tensor:
        """Shape (n, width) to (n, width)."""
        y: Tensor = self.used(x)
        return y + self.unused(x) if both else y


class EveryKind(nn.Module):
    """One parameter of every kind that DDP accepts: a hook that handles this handles any model.

    Called with a scale and token numbers, it returns a scalar whose gradient is 2 * scale * parameter; the
    embedding's gradient is ``scale`` at each token, sparse.
    """

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.scalar = nn.Parameter(torch.zeros(()))
        self.empty = nn.Parameter(torch.zeros(0, 3))
        self.vector = nn.Parameter(torch.zeros(5))
        self.matrix = nn.Parameter(torch.zeros(6, 4))
        self.bf16 = nn.Parameter(torch.zeros(4, 3, dtype=torch.bfloat16))
        self.fp16 = nn.Parameter(torch.zeros(4, 3, dtype=torch.float16))
        self.fp64 = nn.Parameter(torch.zeros(4, 3, dtype=torch.float64))
        self.complex64 = nn.Parameter(torch.zeros(3, 2, dtype=torch.complex64))
        channels_last = torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last)
        self.channels_last = nn.Parameter(channels_last)
        self.transposed = nn.Parameter(torch.zeros(4, 7).t())
        self.embedding = nn.Embedding(6, 3, sparse=True, _weight=torch.zeros(6, 3))
        _seeded(self, seed)

    def forward(self, scale: Tensor, tokens: Tensor) -> Tensor:
        """Scale: a float64 scalar; tokens: int64, below 6. Returns a float64 scalar."""
        total: Tensor = self.embedding(tokens).sum().double() * scale
        for name, parameter in self.named_parameters(recurse=False):
            flat = torch.view_as_real(parameter) if name == "complex64" else parameter
            total = total + flat.double().square().sum() * scale
        return total

    @staticmethod
    def batch(rank: int, step: int) -> tuple[Tensor, Tensor]:
        """Inputs that differ between ranks and steps, for ``train(..., batch=EveryKind.batch)``."""
        scale = torch.tensor(1 + rank + 0.25 * step, dtype=torch.float64)
        return scale, torch.tensor([rank % 6, (rank + step) % 6, 5])


def _linear(inner: int, outer: int) -> nn.Linear:
    # By way of the meta device, whose initialisation draws nothing from the global generator.
    return nn.Linear(inner, outer, device="meta").to_empty(device="cpu")


def _seeded(module: M, seed: int) -> M:
    """Fill the parameters from a generator of their own; the global one is left alone."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            real = torch.view_as_real(parameter) if parameter.is_complex() else parameter
            real.copy_(torch.empty(real.shape).normal_(0, 0.5, generator=generator))
    return module


def batches(width: int, rows: int = 4, seed: int = 0) -> Batch:
    """Normal inputs of shape (rows, width), different on each rank and in each step."""

    def batch(rank: int, step: int) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(seed + 1_000_003 * rank + step)
        return (torch.randn(rows, width, generator=generator),)

    return batch


@attrs.frozen(kw_only=True)
class Run:
    """What ``train`` saw."""

    losses: list[float]
    gradients: list[dict[str, Tensor]]
    """Per step, by parameter name, as the optimizer got them; a parameter without a gradient is left out."""
    parameters: dict[str, Tensor]
    """After the last step."""


def train(
    model: nn.Module,
    steps: int = 3,
    *,
    first_step: int = 0,
    batch: Batch | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    lr: float = 0.1,
) -> Run:
    """Train on this rank's batches and keep losses, gradients and the final parameters (all copies).

    The loss is the output if it is a scalar, else its mean square.

    Args:
        model: to be trained, under DDP or not.
        steps: how many.
        first_step: the number of the first one, which batches depend on.
        batch: given rank and step, the input; by default normal, and as wide as the model's first linear layer.
        optimizer: by default SGD with ``lr``.
        lr: its learning rate.
    """
    rank = dist.get_rank() if dist.is_initialized() else 0
    bare = getattr(model, "module", model)
    if batch is None:
        batch = batches(next(m.in_features for m in bare.modules() if isinstance(m, nn.Linear)))
    if optimizer is None:
        optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    losses, gradients = [], []
    for step in range(first_step, first_step + steps):
        optimizer.zero_grad()
        output = model(*batch(rank, step))
        loss = output if output.dim() == 0 else output.square().mean()
        loss.backward()
        losses.append(loss.item())
        gradients.append({n: p.grad.clone() for n, p in bare.named_parameters() if p.grad is not None})
        optimizer.step()
    return Run(
        losses=losses,
        gradients=gradients,
        parameters={n: p.detach().clone() for n, p in bare.named_parameters()},
    )
