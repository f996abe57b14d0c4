"""What a bench's numbers say, in one sentence that is as plain about compression that does not pay."""

from __future__ import annotations

from typing import TYPE_CHECKING

from commhub.bench import _format

if TYPE_CHECKING:
    from ._results import HookResult, Outcome

_WORSE_LOSS = 0.02
"""A held-out loss higher by more than this share of the baseline's is worth a word."""
_TELLING = 0.2
"""Where the middle half of the step times spreads wider than this share of the median, equal medians mean little:
on a machine that does nothing else it is below 0.05."""
_FEW = 10
"""With fewer timed steps than this, the middle halves of scattered times lie apart by chance too."""
_COMPRESSES = 1.05
"""From this compression on, a hook claims to save bytes."""


def verdict(outcome: Outcome) -> str:
    """Who is fastest, and with whom compression does not pay; empty where nothing can be compared."""
    base = outcome.baseline
    others = [x for x in outcome.results if x is not base and x.status == "done" and not x.silent]
    if base is None or base.status != "done" or not others:
        return ""
    unclear = [x for x in others if _is_unclear(outcome, x, base)]
    faster = [x for x in others if x not in unclear and outcome.faster(x, base)]
    rest = [x for x in others if x not in faster and x not in unclear]
    in_vain = [x for x in rest if (x.compression or 1.0) >= _COMPRESSES]
    parts = []
    if faster:
        best = max(faster, key=lambda x: outcome.speedup(x) or 0.0)
        speed = _format.times(outcome.speedup(best))
        parts.append(f"{best.hook} is the fastest, {speed} as fast as {base.hook}{_at_what_loss(best, base)}")
    if in_vain:
        speeds = _join([f"{x.hook} is {_format.times(outcome.speedup(x))}" for x in in_vain])
        parts.append(f"{speeds} as fast as {base.hook}: compression does not pay here")
    if unclear:
        names = _join([x.hook for x in unclear])
        parts.append(f"the step times of {names} scatter too much to tell: use an idle machine or more --steps")
    if not parts:
        parts.append(f"no hook is measurably faster than {base.hook}")
    return f"On this {_link(outcome)} {'; '.join(parts)}."


def _is_unclear(outcome: Outcome, x: HookResult, base: HookResult) -> bool:
    """Whether the times scatter, and so much, or are so few, that no difference shows."""
    if max(x.scatter, base.scatter) <= _TELLING:
        return False
    apart = outcome.faster(x, base) or outcome.faster(base, x)
    return not apart or min(len(x.timed), len(base.timed)) < _FEW


def _link(outcome: Outcome) -> str:
    if outcome.link:
        return "emulated link"
    return "machine" if outcome.setup.get("machines") == 1 else "network"


def _at_what_loss(result: HookResult, base: HookResult) -> str:
    if result.validation_loss is None or base.validation_loss is None:
        return ""
    more = result.validation_loss - base.validation_loss
    if more <= _WORSE_LOSS * base.validation_loss:
        return ""
    return f", at a held-out loss {more:.3f} higher after as many steps"


def _join(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
