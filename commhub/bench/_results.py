"""What was measured, as values: one record per step, one result per hook, one outcome per bench. No torch."""

from __future__ import annotations

import math
import statistics
from typing import TYPE_CHECKING, Any

import attrs

if TYPE_CHECKING:
    from ._timed import TimedStep

BASELINE = "allreduce"
SAME = 0.05
"""Step times closer than this are called equal: repeated runs of one hook differ by a few percent."""
PARTS = ("compute", "encode", "wait", "decode")


@attrs.frozen(kw_only=True)
class StepRecord:
    """One training step, averaged over the ranks. Times are seconds.

    Attributes:
        encode, wait, decode: for how long the training thread stood still while the hook worked; ``seconds`` minus
            their sum is the computation.
        sent_bytes: what one rank sent.
        reference_bytes: what one rank would have sent in a plain all-reduce of the same gradients.
    """

    step: int
    loss: float
    seconds: float
    encode: float
    wait: float
    decode: float
    sent_bytes: float
    reference_bytes: float


@attrs.frozen(kw_only=True)
class HookResult:
    """All that was measured under one hook. What was not measured is ``None``.

    Attributes:
        ran_as: the hook string that was registered: ``hook`` with what the bench sets, such as ``start_step=0``.
        status: ``"done"``, ``"failed"``, ``"interrupted"`` or ``"not run"``.
        warmup: so many records count for the loss and not for the times.
        error: why it failed.
        race: steps that were timed in turn with those of the other hooks; where there are any, times are theirs.
    """

    hook: str
    ran_as: str
    status: str
    warmup: int
    records: tuple[StepRecord, ...] = ()
    validation_loss: float | None = None
    error: str | None = None
    race: tuple[TimedStep, ...] = ()

    @property
    def name(self) -> str:
        """The hook string without its options."""
        return self.hook.partition("(")[0]

    @property
    def timed(self) -> tuple[StepRecord, ...] | tuple[TimedStep, ...]:
        """What was timed in turn with others; else the records after the warm-up."""
        return self.race or tuple(record for record in self.records if record.step >= self.warmup)

    @property
    def loss(self) -> float | None:
        """The training loss at the end: the mean over the last tenth of the steps."""
        last = self.records[-max(1, len(self.records) // 10) :]
        return statistics.fmean(record.loss for record in last) if last else None

    @property
    def step_seconds(self) -> float | None:
        """The median time of a step."""
        return statistics.median(record.seconds for record in self.timed) if self.timed else None

    @property
    def step_quartiles(self) -> tuple[float, float] | None:
        """The times that a quarter of the steps stayed below, and a quarter above."""
        times = sorted(record.seconds for record in self.timed)
        if len(times) < 2:
            return (times[0], times[0]) if times else None
        low, _, high = statistics.quantiles(times, n=4, method="inclusive")
        return low, high

    @property
    def scatter(self) -> float:
        """How wide the middle half of the step times spreads, as a share of their median."""
        if not self.step_seconds or not self.step_quartiles:
            return 0.0
        return (self.step_quartiles[1] - self.step_quartiles[0]) / self.step_seconds

    @property
    def sent_bytes(self) -> float | None:
        """The mean number of bytes that one rank sent per step."""
        return statistics.fmean(record.sent_bytes for record in self.timed) if self.timed else None

    @property
    def compression(self) -> float | None:
        """How many times fewer bytes were sent than by a plain all-reduce; 1 where nothing is sent at all."""
        reference = sum(record.reference_bytes for record in self.timed)
        sent = sum(record.sent_bytes for record in self.timed)
        if not self.timed:
            return None
        return reference / sent if sent else (math.inf if reference else 1.0)

    @property
    def silent(self) -> bool:
        """Whether it sent nothing where an all-reduce would have: a floor to compare with, no way to train."""
        return self.compression == math.inf

    @property
    def split(self) -> dict[str, float]:
        """The median step in parts: median encode, wait and decode, and the rest as compute."""
        if self.step_seconds is None:
            return {}
        blocked = {part: statistics.median(getattr(x, part) for x in self.timed) for part in PARTS[1:]}
        return {"compute": max(0.0, self.step_seconds - sum(blocked.values())), **blocked}

    def curve(self) -> tuple[list[float], list[float]]:
        """Seconds since the start of training (time in steps only), and the loss, step by step."""
        seconds, elapsed = 0.0, []
        for record in self.records:
            seconds += record.seconds
            elapsed.append(seconds)
        return elapsed, [record.loss for record in self.records]


@attrs.frozen(kw_only=True)
class Outcome:
    """A bench's results, in the order in which its hooks were named.

    Attributes:
        setup: what rank 0 found: versions, device, backend, world_size, parameters, text_bytes.
        link: what was emulated of it, in words; empty if nothing was.
        told_link: what the ranks communicated over, in words.
        hosts: that were made for it, with links of ``bandwidth`` if that was given; 0 if none were.
        bandwidth: bits per second that each host, or each rank on an emulated link, could send; ``None`` if unknown.
        floor: steps without communication, if there were any among those timed in turn.
        remarks: what went otherwise than asked for.
        trace: of the last steps that were timed in turn, if that was asked for.
    """

    settings: dict[str, Any]
    command: str
    machine: dict[str, Any]
    setup: dict[str, Any]
    link: str
    results: tuple[HookResult, ...]
    told_link: str = "as it is"
    hosts: int = 0
    bandwidth: float | None = None
    floor: tuple[TimedStep, ...] = ()
    remarks: tuple[str, ...] = ()
    trace: dict[str, Any] | None = None

    @property
    def baseline(self) -> HookResult | None:
        """What speed-ups are measured against: the first allreduce, else the first hook that was timed."""
        timed = [result for result in self.results if result.step_seconds]
        return next((result for result in timed if result.name == BASELINE), timed[0] if timed else None)

    def speedup(self, result: HookResult) -> float | None:
        """How many times faster a step is than the baseline's."""
        base = self.baseline
        if base is None or not base.step_seconds or not result.step_seconds:
            return None
        return base.step_seconds / result.step_seconds

    def faster(self, one: HookResult, other: HookResult) -> bool:
        """Whether ``one`` took measurably less time: by 5 %, and more than the middle halves of both scatter."""
        if not one.step_seconds or not other.step_seconds or not one.step_quartiles or not other.step_quartiles:
            return False
        apart = one.step_quartiles[1] < other.step_quartiles[0]
        return apart and one.step_seconds * (1 + SAME) < other.step_seconds

    @property
    def measured(self) -> bool:
        """Whether at least one step was."""
        return any(result.records or result.race for result in self.results)

    @property
    def failed(self) -> bool:
        """Whether a hook failed, or was never reached without the user having stopped the bench."""
        return any(result.status == "failed" for result in self.results)
