"""What collectives take on the network that is here, by their size: measured through the driver, as a hook's are."""

from __future__ import annotations

import statistics
import time
from typing import TYPE_CHECKING, Any

import attrs
import torch
from torch import nn

from commhub.protocol._collectives import AllGather, AllReduce, AllToAll

if TYPE_CHECKING:
    from collections.abc import Generator

    import torch.distributed as dist
    from torch import Tensor

    from commhub.protocol._bucket import Bucket
    from commhub.protocol._collectives import Collective
    from commhub.protocol._hook import Exchange, Request

KINDS: tuple[type[Collective], ...] = (AllReduce, AllToAll, AllGather)
_LEAST, _MOST = 256, 4 * 2**20
"""Bytes that a rank sends in the smallest and the largest message; each size is four times the one before."""
_BUDGET = 0.3
"""Seconds for each kind and size."""
_REPEATS = 3, 20


@attrs.frozen(kw_only=True)
class Point:
    """One kind and size of message.

    Attributes:
        sent_bytes: what a rank sends.
        seconds: median over repetitions, mean of the ranks.
        cpu: CPU seconds of a rank's process, all threads; mean of both.
    """

    sent_bytes: float
    seconds: float
    cpu: float


@attrs.frozen
class Curve:
    """What one kind of collective takes by size, the smallest first."""

    points: tuple[Point, ...]

    @property
    def latency(self) -> float:
        """Seconds of a message of nearly no size."""
        return self.points[0].seconds

    @property
    def bits_per_second(self) -> float:
        """The bandwidth of large messages: of the difference between the largest and one a quarter or less of it."""
        last = self.points[-1]
        other = max((p for p in self.points if 4 * p.sent_bytes <= last.sent_bytes), key=lambda p: p.sent_bytes)
        return 8 * (last.sent_bytes - other.sent_bytes) / max(1e-9, last.seconds - other.seconds)

    @property
    def load(self) -> float:
        """The share of a core that is busy while large messages are on their way."""
        return min(1.0, self.points[-1].cpu / self.points[-1].seconds)

    def seconds(self, sent_bytes: float) -> float:
        """What a message of any size takes: between those measured in proportion, beyond them at the bandwidth."""
        if sent_bytes >= self.points[-1].sent_bytes:
            last = self.points[-1]
            return last.seconds + 8 * (sent_bytes - last.sent_bytes) / self.bits_per_second
        below = self.points[0]
        for point in self.points:
            if point.sent_bytes >= sent_bytes:
                part = (sent_bytes - below.sent_bytes) / max(1.0, point.sent_bytes - below.sent_bytes)
                return below.seconds + max(0.0, part) * (point.seconds - below.seconds)
            below = point
        raise AssertionError


def measure(group: dist.ProcessGroup | None = None, budget: float = _BUDGET) -> dict[type[Collective], Curve]:
    """Measure the collectives among the ranks of a group, all alike on all of them. Collective; a few seconds.

    Args:
        group: of two ranks at least; default: all.
        budget: seconds for each kind and size.
    """
    import commhub

    probe, module = _Probe(budget), nn.Linear(1, 1, bias=False)
    registration = commhub.manual(module, probe, process_group=group)
    try:
        registration.average()
    finally:
        registration.remove()
    return probe.curves


class _Probe:
    """A hook that times collectives, and averages nothing."""

    def __init__(self, budget: float) -> None:
        self._budget = budget
        self.curves: dict[type[Collective], Curve] = {}

    def reduce(self, bucket: Bucket) -> Exchange:
        """Each kind in each size; what ranks found is averaged, so that all know the same."""
        for kind in () if self.curves else KINDS:
            points: list[Point] = []
            size = _LEAST
            while size <= _MOST and not (points and points[-1].seconds > self._budget):
                points.append((yield from self._point(kind, size, bucket.world_size)))
                size *= 4
            self.curves[kind] = Curve(tuple(points))

    def _point(self, kind: type[Collective], size: int, p: int) -> Generator[Request, Any, Point]:
        tensor = torch.zeros(_elements(kind, size, p))
        first, _ = yield from self._once(kind, tensor)
        told = yield AllReduce(torch.tensor([first]))
        count = min(_REPEATS[1], max(_REPEATS[0], int(self._budget / max(1e-6, float(told)))))
        seen = []
        for _ in range(count):
            seen.append((yield from self._once(kind, tensor)))
        seconds = statistics.median(seconds for seconds, _ in seen)
        cpu = statistics.fmean(cpu for _, cpu in seen)
        both = (yield AllReduce(torch.tensor([seconds, cpu], dtype=torch.float64))).tolist()
        return Point(sent_bytes=kind.sent_bytes(tensor.nbytes, p), seconds=both[0], cpu=both[1])

    def _once(self, kind: type[Collective], tensor: Tensor) -> Generator[Request, Any, tuple[float, float]]:
        cpu, began = time.process_time(), time.perf_counter()
        yield AllReduce(tensor, op="sum") if kind is AllReduce else kind(tensor)
        return time.perf_counter() - began, time.process_time() - cpu


def _elements(kind: type[Collective], size: int, p: int) -> int:
    """How many float32, a multiple of p, make a rank send about so many bytes."""
    payload = size / (kind.sent_bytes(_MOST, p) / _MOST)
    return p * max(1, round(payload / 4 / p))
