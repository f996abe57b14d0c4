"""Train one model under one hook, and tell what every step took. All ranks do the same."""

from __future__ import annotations

import time
import zlib
from typing import TYPE_CHECKING

import attrs
import torch
import torch.distributed as dist

from commhub.bench import _hooks

from ._model import loss_of
from ._results import StepRecord
from ._sizes import SIZES
from ._wrap import wrap

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

    from commhub import Registration

    from ._data import Text
    from ._model import Transformer
    from ._options import Settings

VALIDATION_WINDOWS = 128
_RISE = 10
"""Steps over which the learning rate rises to its value; AdamW's first steps are unstable at full rate."""


def check_same_text(text: bytes, device: torch.device) -> None:
    """Make sure that every machine found the same text: losses could not be compared otherwise.

    Raises:
        ValueError: if one of them differs, on every rank.
    """
    digest = torch.tensor([len(text), zlib.crc32(text)], dtype=torch.int64, device=device)
    least, most = digest.clone(), digest.clone()
    dist.all_reduce(least, op=dist.ReduceOp.MIN)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    if not torch.equal(least, most):
        raise ValueError("the ranks found different texts: give the same --data on every machine")


def train(
    settings: Settings,
    hook: str,
    text: Text,
    device: torch.device,
    on_step: Callable[[StepRecord], None],
) -> float:
    """Train from the seed's initial weights under ``hook``; returns the validation loss. Collective."""
    size = SIZES[settings.model]
    wrapped = wrap(settings, size, device)
    model = wrapped.model
    optimizer = _optimizer(settings.optimizer, model)
    rate = settings.learning_rate or size.learning_rate(settings.optimizer)
    registration = _hooks.attach(
        model, hook, optimizer=optimizer, link=_hooks.network(settings), group=wrapped.exchange
    )
    rank, world_size = dist.get_rank(), dist.get_world_size()
    for step in range(settings.steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * _pace(step, settings.steps)
        windows = text.batch(step, rank=rank, world_size=world_size, size=settings.batch, seed=settings.seed).to(device)
        _synchronize(device)
        start = time.perf_counter()
        optimizer.zero_grad()
        loss = loss_of(model, windows)
        loss.backward()
        optimizer.step()
        _synchronize(device)
        seconds = time.perf_counter() - start
        on_step(_average(step, loss.detach(), seconds, registration))
    registration.remove()  # also where ranks have drifted apart: they end with the same parameters
    return _validate(wrapped.whole(), text, device, rank, world_size)


def _optimizer(name: str, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer ``name``; each step sets its learning rate."""
    if name == "sgd":  # as in Vogels et al. 2019: linear in the gradient, so that error feedback loses nothing
        return torch.optim.SGD(model.parameters(), momentum=0.9, nesterov=True)
    return torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.1)


def _pace(step: int, steps: int) -> float:
    """The learning rate over its highest value: up within the first steps, then straight down to zero at the end.

    Training ends at a low rate nearly everywhere, and there a hook that delays gradients has caught up.
    """
    return min((step + 1) / _RISE, 1.0 - step / steps)


def _average(step: int, loss: torch.Tensor, seconds: float, registration: Registration) -> StepRecord:
    """The step's record, averaged over the ranks; it also makes them begin the next step together."""
    cost = _hooks.last_cost(registration)
    measured = {"loss": loss.item(), "seconds": seconds, **attrs.asdict(cost)}
    mean = _mean(list(measured.values()), loss.device)
    return StepRecord(step=step, **dict(zip(measured, mean, strict=True)))


@torch.no_grad()
def _validate(model: Transformer, text: Text, device: torch.device, rank: int, world_size: int) -> float:
    """The held-out loss: every rank takes its share of the same windows."""
    model.eval()
    total, count = 0.0, 0
    share = text.validation(rank=rank, world_size=world_size, windows=VALIDATION_WINDOWS)
    for start in range(0, len(share), 16):
        windows = share[start : start + 16].to(device)
        total += loss_of(model, windows).item() * len(windows)
        count += len(windows)
    mean_total, mean_count = _mean([total, float(count)], device)
    return mean_total / mean_count


def _mean(values: list[float], device: torch.device) -> list[float]:
    total = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    mean: list[float] = (total / dist.get_world_size()).tolist()
    return mean


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
