"""Train one model under one hook, and tell what every step took. All ranks do the same."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import attrs
import torch
import torch.distributed as dist

from commhub.bench import _hooks

from ._attach import attach
from ._exchange import mean
from ._model import loss_of
from ._results import StepRecord
from ._sizes import SIZES
from ._wrap import make_optimizer, wrap

if TYPE_CHECKING:
    from collections.abc import Callable

    from ._attach import StepCost
    from ._data import Text
    from ._model import Transformer
    from ._options import Settings

VALIDATION_WINDOWS = 128
_COSTS = {field.name for field in attrs.fields(StepRecord)}
_RISE = 10
"""Steps over which the learning rate rises to its value; AdamW's first steps are unstable at full rate."""


def train(
    settings: Settings,
    hook: str,
    text: Text,
    device: torch.device,
    on_step: Callable[[StepRecord], None],
) -> float:
    """Train from the seed's initial weights under ``hook``; returns the validation loss. Collective."""
    size = SIZES[settings.model]
    wrapped = wrap(settings, size, device, hook=hook)
    model = wrapped.model
    optimizer = make_optimizer(settings.optimizer, model)
    rate = settings.learning_rate or size.learning_rate(settings.optimizer)
    attached = attach(wrapped, hook, optimizer=optimizer, link=_hooks.network(settings))
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
        on_step(_average(step, loss.detach(), seconds, attached.cost()))
    attached.end()  # also where ranks have drifted apart: they end with the same parameters
    return _validate(wrapped.whole(), text, device, rank, world_size)


def _pace(step: int, steps: int) -> float:
    """The learning rate over its highest value: up within the first steps, then straight down to zero at the end.

    Training ends at a low rate nearly everywhere, and there a hook that delays gradients has caught up.
    """
    return min((step + 1) / _RISE, 1.0 - step / steps)


def _average(step: int, loss: torch.Tensor, seconds: float, cost: StepCost) -> StepRecord:
    """The step's record, averaged over the ranks; it also makes them begin the next step together."""
    measured = {"loss": loss.item(), "seconds": seconds, **attrs.asdict(cost, filter=lambda x, _: x.name in _COSTS)}
    means = mean(list(measured.values()), loss.device)
    return StepRecord(step=step, **dict(zip(measured, means, strict=True)))


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
    mean_total, mean_count = mean([total, float(count)], device)
    return mean_total / mean_count


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
