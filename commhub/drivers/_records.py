"""What is kept of a bucket's exchange: times and sizes, and nothing that a tensor, a task or a model hangs on.

All times are those of ``time.monotonic``, in seconds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import attrs

if TYPE_CHECKING:
    from commhub.protocol._spans import Span

Interval = tuple[float, float]
"""From when to when."""
Purpose = Literal["gradients", "parameters", "word"]
"""What a bucket holds: gradients, an averager's parameters, or what commhub itself asks the ranks."""


@attrs.define(eq=False)
class StageRecord:
    """One stage of a bucket: what the hook asked for at one ``yield``.

    Attributes:
        kinds: of the collectives, such as ``("AllReduce",)``, in the order in which they are issued.
        payload_bytes: what they carry, as it travels.
        sent_bytes: what this rank sends for that.
        encode: the hook's work that led to them, casts included.
        issued: when they were given to the communicator; ``None`` until then.
        landed: when their results had been taken; ``None`` until then.
    """

    kinds: tuple[str, ...]
    payload_bytes: int
    sent_bytes: float
    encode: Interval
    issued: float | None = None
    landed: float | None = None


@attrs.define(eq=False)
class BucketRecord:
    """One bucket's exchange.

    Attributes:
        hook: the name of the hook that was registered.
        index: place of the bucket in the order of arrival, as a ``Bucket`` has it.
        purpose: what it holds.
        ready: when training submitted it.
        enqueued: whether the times are those at which the host enqueued work on a device, and not those of the work.
        logical_bytes: what a plain all-reduce of it would have sent.
        stages: in order.
        decode: the hook's work after its last collective; ``None`` until then.
        complete: when it was done with, however it ended; ``None`` until then.
        stages_before: how many stages the bucket had the time before, where a profiler was on; else 1.
    """

    hook: str
    index: int
    purpose: Purpose
    ready: float
    enqueued: bool = False
    _spans: tuple[Span, ...] = ()
    logical_bytes: float = 0.0
    stages: list[StageRecord] = attrs.Factory(list)
    decode: Interval | None = None
    complete: float | None = None
    stages_before: int = 1

    @property
    def names(self) -> tuple[str, ...]:
        """The parameters' names, in the bucket's order."""
        return tuple(span.name for span in self._spans)
