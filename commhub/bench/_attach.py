"""A hook on a model, and what each of its steps cost: commhub's by registration, or PyTorch's own to compare with."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import attrs
import torch.distributed as dist

from . import _pytorch
from ._intervals import together

if TYPE_CHECKING:
    import torch
    from torch.nn.parallel import DistributedDataParallel

    from commhub import Registration
    from commhub.drivers._network import Network

    from ._wrap import Wrapped

_UNKNOWN = float("nan")


@attrs.frozen(kw_only=True)
class StepCost:
    """One step's communication on this rank; NaN for what cannot be known. Times are seconds.

    Attributes:
        reference_bytes: what a plain all-reduce of the same gradients would have sent.
        encode, wait, decode: for how long the training thread stood still.
        wire: for how long any message was on its way.
        busy: for how long any bucket was being encoded, on its way or being decoded.
    """

    sent_bytes: float
    reference_bytes: float
    encode: float
    wait: float
    decode: float
    wire: float
    busy: float


class Attached(Protocol):
    """A hook at work."""

    def cost(self) -> StepCost:
        """What the step that has just ended cost."""

    def trace(self) -> dict[str, Any]:
        """The last steps as a trace, as JSON has it."""

    def end(self) -> None:
        """Take it off the model, whose parameters are alike on all ranks then. Collective."""

    def close(self) -> None:
        """Free what it holds, on this rank alone; the model is not trained any more."""


def attach(wrapped: Wrapped, hook: str, *, optimizer: torch.optim.Optimizer, link: Network | None) -> Attached:
    """Put ``hook`` on a model, on the emulated link if there is one. Collective."""
    if _pytorch.is_pytorchs(hook):
        assert wrapped.ddp is not None
        _pytorch.register(wrapped.ddp, hook)
        return _Theirs(wrapped.ddp, _pytorch.sent_share(hook))
    import commhub

    registration = commhub.register(wrapped.model, hook, optimizer=optimizer, process_group=wrapped.exchange)
    if link is not None:
        registration.emulate(link)
    return _Ours(registration)


@attrs.frozen
class _Ours:
    _registration: Registration

    def cost(self) -> StepCost:
        last = self._registration.stats.last
        step = self._registration.timeline()[-1]
        buckets = [bucket for bucket in step.buckets if bucket.purpose != "word"]
        stages = [stage for bucket in buckets for stage in bucket.stages]
        encodes = [stage.encode for stage in stages]
        decodes = [bucket.decode for bucket in buckets if bucket.decode is not None]
        flights = [(x.issued, x.landed) for x in stages if x.issued is not None and x.landed is not None]
        return StepCost(
            sent_bytes=last.sent_bytes,
            reference_bytes=last.logical_bytes,
            encode=last.exposed["encode"],
            wait=last.exposed["wait"],
            decode=last.exposed["decode"],
            wire=together(flights),
            busy=together([*encodes, *flights, *decodes]),
        )

    def trace(self) -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "trace.json")
            self._registration.timeline(file)
            made: dict[str, Any] = json.loads(file.read_text())
            return made

    def end(self) -> None:
        self._registration.remove()

    def close(self) -> None:
        self._registration.close()


@attrs.frozen
class _Theirs:
    _model: DistributedDataParallel
    _share: float

    def cost(self) -> StepCost:
        p = dist.get_world_size()
        reference = 2 * (p - 1) / p * sum(each.numel() * each.itemsize for each in self._model.parameters())
        return StepCost(
            sent_bytes=self._share * reference,
            reference_bytes=reference,
            encode=0.0,
            wait=0.0,
            decode=0.0,
            wire=_UNKNOWN,
            busy=_UNKNOWN,
        )

    def trace(self) -> dict[str, Any]:
        """Nobody has recorded anything."""
        return {"traceEvents": []}

    def end(self) -> None:
        """PyTorch has no way to do that, and every step has left the parameters alike."""

    def close(self) -> None:
        """It holds nothing."""
