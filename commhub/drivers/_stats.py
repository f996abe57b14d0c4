"""What a registration measures: bytes and seconds, per step and in all."""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs

if TYPE_CHECKING:
    from commhub.protocol._bucket import Bucket

    from ._records import Purpose


@attrs.define
class StepStats:
    """One step, on this rank. Bytes are those of the bandwidth-optimal collectives; seconds are wall time.

    Attributes:
        logical_bytes: what a plain all-reduce of the same gradients would have sent.
        sent_bytes: what was sent.
        encode_seconds: the hook's work before a collective, casts included.
        wait_seconds: waiting for collectives with nothing else to do.
        decode_seconds: the hook's work after its last collective.
        exposed: the part of each in which training stood still, by phase.
    """

    logical_bytes: float = 0.0
    sent_bytes: float = 0.0
    encode_seconds: float = 0.0
    wait_seconds: float = 0.0
    decode_seconds: float = 0.0
    exposed: dict[str, float] = attrs.Factory(lambda: {"encode": 0.0, "wait": 0.0, "decode": 0.0})

    @property
    def exposed_seconds(self) -> float:
        """How long training stood still for communication."""
        return sum(self.exposed.values())

    @property
    def compression(self) -> float:
        """Logical over sent bytes; 1 where there is nothing to send, infinite where a hook sends nothing."""
        if self.logical_bytes == self.sent_bytes:
            return 1.0
        return self.logical_bytes / self.sent_bytes if self.sent_bytes else float("inf")

    def add(self, other: StepStats) -> None:
        """Add another record's figures to this one's."""
        for name in ("logical_bytes", "sent_bytes", "encode_seconds", "wait_seconds", "decode_seconds"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for phase, seconds in other.exposed.items():
            self.exposed[phase] += seconds


@attrs.define
class Stats(StepStats):
    """All steps of a registration, and the last one apart."""

    steps: int = 0
    last: StepStats = attrs.Factory(StepStats)

    def end_step(self, step: StepStats) -> None:
        """Count one finished step."""
        self.add(step)
        self.steps += 1
        self.last = step


class Meter:
    """Counts the bytes of a virtual rank, which has no time: a ``Recorder`` does for a driver what it leaves out."""

    def __init__(self) -> None:
        self.step = StepStats()

    def open(self, bucket: Bucket, purpose: Purpose) -> None:
        """Nothing is recorded."""
