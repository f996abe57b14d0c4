"""What the hub says of each hook, and which one it recommends, with its reason in a sentence."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal

import attrs

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from commhub.registry._spec import HookSpec

Accuracy = Literal["exact", "rounding", "lossy"]
_WORTH = 0.05
"""The share of a step that a hook must save to be recommended: what is predicted holds no better than that."""
_SLOWEST, FASTEST = 1e6, 1e13
"""Bits per second between which the bandwidth is looked for below which a hook pays."""


@attrs.frozen(kw_only=True)
class HookAdvice:
    """One hook on this model and network.

    Attributes:
        hook: the hook string.
        predicted_step_seconds: what a step takes.
        sent_bytes: what a rank sends in it.
        pays_below_bits_per_second: the bandwidth below which a step is faster than with a plain all-reduce; ``None``
            where it pays at none, or is that itself; at most ``FASTEST``.
        accuracy: ``"exact"``, ``"rounding"`` (the error of one step has a bound) or ``"lossy"``.
        agrees: whether all ranks are left with the same result.
    """

    hook: str
    predicted_step_seconds: float
    sent_bytes: float
    pays_below_bits_per_second: float | None
    accuracy: Accuracy
    agrees: bool = True


@attrs.frozen(kw_only=True)
class Recommendation:
    """Which hook, and why."""

    hook: str
    reason: str


@attrs.frozen(kw_only=True)
class Advice:
    """All that is to be said.

    Attributes:
        link: ``bits_per_second``, ``latency_seconds``, ``ranks``, ``ranks_per_host``, and whether it was ``measured``.
        hooks: the fastest first.
        recommendation: one of them, or a plain all-reduce.
    """

    link: dict[str, Any]
    hooks: tuple[HookAdvice, ...]
    recommendation: Recommendation

    def as_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return attrs.asdict(self)


def accuracy_of(spec: HookSpec) -> Accuracy:
    """The class of a hook's error: that of the gradient's dtype, one with a bound for each step, or one without."""
    if spec.exact:
        return "exact"
    return "lossy" if spec.tolerance is None else "rounding"


def recommend(
    hooks: Sequence[HookAdvice], plain: HookAdvice, *, silent_seconds: float, allowed: Sequence[Accuracy]
) -> Recommendation:
    """Choose among hooks: the least loss of accuracy that is nearly as fast as any, if it is worth anything at all.

    Args:
        hooks: what was predicted.
        plain: a plain all-reduce, to compare with.
        silent_seconds: what a step without communication takes.
        allowed: the classes of accuracy to choose from.
    """
    fair = [each for each in hooks if each.agrees and each.accuracy in allowed]
    best = min(fair, key=lambda each: each.predicted_step_seconds, default=plain)
    exposed = 1 - silent_seconds / plain.predicted_step_seconds
    if 1 - best.predicted_step_seconds / plain.predicted_step_seconds < _WORTH:
        return Recommendation(
            hook=plain.hook,
            reason=f"nothing here is worth its cost: of a step with {plain.hook}, {exposed:.0%} is spent waiting for "
            f"communication, and the fastest hook, {best.hook}, would take "
            f"{best.predicted_step_seconds / plain.predicted_step_seconds:.2f} of its time.",
        )
    limit = best.predicted_step_seconds * (1 + _WORTH)
    near = [each for each in fair if each.predicted_step_seconds <= limit]
    order: tuple[Accuracy, ...] = ("exact", "rounding", "lossy")
    chosen = min(near, key=lambda each: (order.index(each.accuracy), each.predicted_step_seconds))
    share = chosen.predicted_step_seconds / plain.predicted_step_seconds
    slower = "" if chosen is best else f", within {_WORTH:.0%} of the fastest, {best.hook}, with less loss of accuracy"
    return Recommendation(
        hook=chosen.hook,
        reason=f"a step takes {share:.2f} of the time that it takes with {plain.hook}, of which {exposed:.0%} is spent "
        f"waiting{slower}.",
    )


def pays_below(faster: Callable[[float], bool]) -> float | None:
    """The bandwidth in bits per second below which something holds; ``None`` if never, ``FASTEST`` if always.

    Args:
        faster: whether it holds at a bandwidth; where it does, it also does at all lower ones.
    """
    if not faster(_SLOWEST):
        return None
    if faster(FASTEST):
        return FASTEST
    low, high = math.log(_SLOWEST), math.log(FASTEST)
    while high - low > 1e-3:
        middle = (low + high) / 2
        low, high = (middle, high) if faster(math.exp(middle)) else (low, middle)
    return math.exp(low)
