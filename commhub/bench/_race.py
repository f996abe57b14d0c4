"""Time steps of several hooks in one go: a step of each in turn, in an order that is shuffled in every round.

Whatever else the machine does, and however it changes, hits all hooks alike. Their models share one set of weights,
which no step moves, and have gradients, buckets and an optimizer of their own. All ranks do the same.
"""

from __future__ import annotations

import json
import os
import random
import time
from typing import TYPE_CHECKING, Any

import attrs
import torch
import torch.distributed as dist

from commhub.bench import _format, _hooks

from ._attach import attach
from ._exchange import any_of, gather, mean
from ._interface import sent_bytes
from ._model import loss_of
from ._sizes import SIZES
from ._timed import TimedStep
from ._wrap import make_optimizer, wrap

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

    from ._data import Text
    from ._options import Settings
    from ._wrap import Wrapped

_WARM_UP = 3
"""Steps until DDP has laid its buckets out anew, and everything that a hook makes when it is first used is there."""


def race(
    settings: Settings,
    hooks: Mapping[int, str],
    text: Text,
    device: torch.device,
    emit: Callable[[dict[str, Any]], None],
) -> None:
    """Time ``settings.repeats`` steps of each hook, after some that are not timed. Collective.

    Args:
        settings: what to train, and how.
        hooks: hook strings by the index that events have.
        text: to train on.
        device: where.
        emit: called with an event for each timed step, and for each hook that has failed on any rank.
    """
    runners: dict[int, _Runner] = {}
    first: Wrapped | None = None
    for index, hook in hooks.items():
        runner, error = None, ""
        try:
            runner = _Runner(settings, hook, device, first)
        except Exception as err:  # noqa: BLE001 - whatever a hook raises becomes its row
            error = _format.error(err)
        if any_of(bool(error), device):
            emit({"kind": "dropped", "index": index, "error": error or "failed on another rank"})
        elif runner is not None:
            runners[index] = runner
            first = first or runner.wrapped
    for repeat in range(-_WARM_UP, settings.repeats):
        order = list(runners)
        random.Random(f"{settings.seed} {repeat}").shuffle(order)  # noqa: S311 - alike on all ranks
        windows = _batch(text, settings, max(0, repeat), device)
        for index in order:
            error, figures = "", [0.0] * len(_FIGURES)
            try:
                figures = runners[index].step(windows)
            except Exception as err:  # noqa: BLE001 - whatever a hook raises becomes its row
                error = _format.error(err)
            means = mean(figures, device)
            if any_of(bool(error), device):
                del runners[index]
                emit({"kind": "dropped", "index": index, "error": error or "failed on another rank"})
            elif repeat >= 0:
                emit({"kind": "timed", "index": index, "record": attrs.asdict(_record(repeat, means))})
    if settings.timeline:
        emit(
            {
                "kind": "timeline",
                "trace": _together({index: x.attached.trace() for index, x in runners.items()}, device),
            }
        )
    for runner in runners.values():
        runner.attached.close()


_FIGURES = [field.name for field in attrs.fields(TimedStep) if field.name != "repeat"]


def _together(traces: dict[int, dict[str, Any]], device: torch.device) -> dict[str, Any]:
    """The traces of all hooks and ranks in one: a process for each hook on each rank, those of a hook side by side."""
    events = []
    for place, made in enumerate(traces.values()):
        for event in made["traceEvents"]:
            event["pid"] += place * dist.get_world_size()
            if event["name"] == "process_sort_index":
                event["args"]["sort_index"] = event["pid"]
            events.append(event)
    everything = [event for text in gather(json.dumps(events), device) for event in json.loads(text)]
    return {"displayTimeUnit": "ms", "traceEvents": everything}


def _record(repeat: int, means: list[float]) -> TimedStep:
    step = TimedStep(repeat=repeat, **dict(zip(_FIGURES, means, strict=True)))
    return step if _interface() is not None else attrs.evolve(step, interface_bytes=None)


class _Runner:
    """One hook's model, ready to take steps."""

    def __init__(self, settings: Settings, hook: str, device: torch.device, first: Wrapped | None) -> None:
        self.wrapped = wrap(settings, SIZES[settings.model], device, hook=hook, like=first)
        self._device = device
        self._optimizer = make_optimizer(settings.optimizer, self.wrapped.model)
        for group in self._optimizer.param_groups:
            group["lr"] = 0.0
        self.attached = attach(self.wrapped, hook, optimizer=self._optimizer, link=_hooks.network(settings))

    def step(self, windows: Tensor) -> list[float]:
        """Take one step; its ``_FIGURES``."""
        sent, cpu, began = _sent(), time.process_time(), time.perf_counter()
        self._optimizer.zero_grad()
        loss_of(self.wrapped.model, windows).backward()
        self._optimizer.step()
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        seconds, cpu, sent = time.perf_counter() - began, time.process_time() - cpu, _sent() - sent
        cost = attrs.asdict(self.attached.cost())
        figures = {"seconds": seconds, "cpu_seconds": cpu, "interface_bytes": float(sent), **cost}
        return [figures[name] for name in _FIGURES]


def _interface() -> str | None:
    """The interface that ranks communicate on, if it leads to other hosts and its bytes can be read."""
    name = os.environ.get("GLOO_SOCKET_IFNAME")
    return name if name not in (None, "", "lo") and sent_bytes(name) is not None else None


def _sent() -> int:
    name = _interface()
    return (sent_bytes(name) or 0) if name is not None else 0


def _batch(text: Text, settings: Settings, step: int, device: torch.device) -> Tensor:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    return text.batch(step, rank=rank, world_size=world_size, size=settings.batch, seed=settings.seed).to(device)
