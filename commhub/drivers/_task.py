"""One bucket's exchange under way: the hook's generator, driven step by step with nothing leaking in or out."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Collection, Generator, Sequence
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor

from commhub._errors import HookError, described
from commhub.protocol._collectives import foreign
from commhub.protocol._finite import is_number

from . import _ranges
from ._job import Job, Scratch, make_job
from ._timeline import encoded

if TYPE_CHECKING:
    from commhub.protocol._bucket import Bucket
    from commhub.protocol._collectives import Subgroup
    from commhub.protocol._hook import Hook, Scatterer

    from ._asked import Position
    from ._observers import Observers, Shown
    from ._records import Purpose
    from ._stats import Meter
    from ._timeline import Recorder

logger = logging.getLogger("commhub")


class Task:
    """Drives ``hook.reduce(bucket)``: ``start``, then ``resume`` the results of ``jobs`` until ``finished``.

    ``groups`` are those among which it has communicated so far, ``None`` for all ranks; ``stage`` is the number of
    times it has. ``record`` is what is kept of its times, if anything.

    Args:
        hook: whose generator to drive.
        bucket: what it reduces.
        world: ranks of the whole group.
        wire: the registration's wire dtype.
        scratch: the driver's.
        meter: gives the record.
        purpose: what the bucket holds.
        watch: whether to keep ``bucket.finite``: for hooks that hold state.
        position: where it stands among all that the ranks do alike; ``None`` where nobody compares what they ask for.
        observers: who is told of its collectives and their results, in the thread that drives it.
        done: called once, when the exchange has ended or was given up.
    """

    def __init__(
        self,
        hook: Hook,
        bucket: Bucket,
        *,
        world: int,
        wire: torch.dtype | None,
        scratch: Scratch,
        meter: Meter | Recorder,
        watch: bool,
        purpose: Purpose = "gradients",
        position: Position | None = None,
        observers: Observers | None = None,
        groups: Collection[Subgroup] | None = None,
        done: Callable[[], None] = lambda: None,
    ) -> None:
        self.bucket = bucket
        self.position = position
        self.stage = -1
        self.jobs: tuple[Job, ...] = ()
        self.groups: set[Subgroup | None] = set()
        self.finished = False
        self.started = False
        self.issued_at = 0.0
        self.entered = 0
        self._hook, self._world, self._wire, self._scratch = hook, world, wire, scratch
        self._watch = watch
        self.record = meter.open(bucket, purpose)
        self._observers, self._known = observers, groups
        self._shown: Shown | None = None
        self._done = [done]
        self._flat, self._shard = bucket.flat, bucket.shard
        self._single = False
        self._exchange: Generator[Any, Any, None] | None = None

    def start(self) -> None:
        """Run the hook up to its first collective."""
        self.started = True
        began = self._now()
        with torch.no_grad(), self._no_autocast(), _ranges.of(self.record, "encode"):
            scatters = self._shard is not None
            reduce = cast("Scatterer", self._hook).reduce_scatter if scatters else self._hook.reduce
            exchange = reduce(self.bucket)
            if not isinstance(exchange, Generator):
                called, where = ("reduce_scatter", "shard") if scatters else ("reduce", "flat")
                raise HookError(
                    f"{called}() returned {type(exchange).__name__}. Write it as a generator: yield the collectives, "
                    f"leave the result in bucket.{where}."
                )
            self._exchange = exchange
            self._send(None, began)

    def resume(self, raws: Sequence[Tensor]) -> None:
        """Give the hook the results of ``jobs``, as they travelled, and run it up to its next collectives."""
        began = self._now()
        if self.record is not None:
            self.record.stages[-1].landed = began
        with torch.no_grad(), self._no_autocast(), _ranges.of(self.record, self._phase()):
            results = tuple(job.result(raw) for job, raw in zip(self.jobs, raws, strict=True))
            if self._watch:
                self._note_finite(results)
            if self._shown is not None:
                shown, self._shown = self._shown, None
                shown.answered(results)
            self._send(results[0] if self._single else results, began)

    def complete(self) -> None:
        """Say that this bucket is done with, however it ended. Any thread may, and the first one does."""
        with contextlib.suppress(IndexError):
            done = self._done.pop()
            if self.record is not None:
                self.record.complete = time.monotonic()
            done()

    def cancel(self) -> None:
        """Close the generator; the bucket keeps whatever is in it. Raises nothing."""
        self.finished = True
        exchange, self._exchange = self._exchange, None
        try:
            if exchange is not None:
                exchange.close()
            self.bucket.look_at_written()
        except BaseException as error:  # noqa: BLE001 - a hook may raise anything, and the step has failed already
            logger.warning("a hook raised while its exchange was being given up: %s", described(error))
        self.complete()

    def _send(self, value: Any, began: float) -> None:
        assert self._exchange is not None
        try:
            request = self._exchange.send(value)
        except StopIteration:
            self._finish()
            if self.record is not None:
                self.record.decode = began, time.monotonic()
            return
        self._single = not isinstance(request, tuple)
        requests = (request,) if self._single else request
        if self._observers:
            self._shown = self._observers.asked(self.bucket, requests)
        self.jobs = tuple(make_job(r, self.bucket, self._world, self._wire, self._scratch) for r in requests)
        self.stage += 1
        for job in self.jobs:
            if job.group is not None and self._known is not None and job.group not in self._known:
                raise HookError(f"yielded {job.kind.__name__} among {foreign(job.group)}")
            self.groups.add(job.group)
        if self.record is not None:
            self.record.stages.append(encoded(self.jobs, began, time.monotonic()))

    def _phase(self) -> Literal["encode", "decode"]:
        """What the hook is about to do. That it is the last piece is known at its end: it was, the step before."""
        is_last = self.record is not None and len(self.record.stages) >= self.record.stages_before
        return "decode" if is_last else "encode"

    def _now(self) -> float:
        """Monotonic seconds; 0 where nothing is recorded."""
        return 0.0 if self.record is None else time.monotonic()

    def _no_autocast(self) -> contextlib.AbstractContextManager[object]:
        kind = self._flat.device.type
        return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else contextlib.nullcontext()

    def _finish(self) -> None:
        self.finished = True
        if not self.bucket.is_entered:
            raise HookError(
                "gave a part with a subgroup to a hook that does not keep to it. Make that one with commhub.create."
            )
        bucket = self.bucket
        if self._shard is not None:
            bucket.shard = _taken("shard", bucket.shard, self._shard)
        else:
            bucket.flat = _taken("flat", bucket.flat, self._flat)
        if self._watch and self.groups:
            self.bucket.look_at_end()

    def _note_finite(self, results: tuple[Tensor, ...]) -> None:
        for job, result in zip(self.jobs, results, strict=True):
            alike = job.kind.alike and is_number(result)
            if alike:
                self.bucket.look_at(result)
            if not alike or job.p != self.bucket.world_size:
                self.bucket.overlook()


def _taken(where: str, result: object, own: Tensor) -> Tensor:
    """The bucket's own tensor, with what the hook has left in another one."""
    if result is own:
        return own
    if not isinstance(result, Tensor) or result.shape != own.shape:
        found = f"shape {tuple(result.shape)}" if isinstance(result, Tensor) else type(result).__name__
        raise HookError(f"left {found} in bucket.{where} for shape {tuple(own.shape)}. Write into bucket.{where}.")
    if result.dtype != own.dtype or result.device != own.device:
        found, wanted = (f"{t.dtype}".removeprefix("torch.") for t in (result, own))
        if found == wanted:
            found, wanted = str(result.device), str(own.device)
        raise HookError(f"returned {found} for {wanted}. Cast it back.")
    return own.copy_(result)
