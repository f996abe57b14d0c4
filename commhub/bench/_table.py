"""The table at the end, and the sentence that says what its numbers mean. Plain text, no rich."""

from __future__ import annotations

import math
import statistics
from typing import TYPE_CHECKING

from commhub.bench import _format

if TYPE_CHECKING:
    from commhub.bench._results import HookResult, Outcome

HEADER = ("hook", "loss", "val. loss", "step time", "sent / step", "compression", "speed-up")
_SAME = 0.05
"""Step times closer than this are called equal: repeated runs of one hook differ by a few percent."""
_WORSE_LOSS = 0.02
"""A held-out loss higher by more than this share of the baseline's is worth a word."""


def rows(outcome: Outcome) -> list[tuple[str, ...]]:
    """One row of texts per hook, in the order of `HEADER`; what was not measured is a dash."""
    return [
        (
            result.hook,
            _format.loss(result.loss),
            _format.loss(result.validation_loss),
            _format.seconds(result.step_seconds),
            _format.size(result.sent_bytes),
            _format.times(result.compression),
            _format.times(outcome.speedup(result)),
        )
        for result in outcome.results
    ]


def table(outcome: Outcome) -> str:
    """Aligned columns, numbers to the right; then a line for each hook that did not end."""
    lines = [HEADER, *rows(outcome)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(HEADER))]
    text = [
        "  ".join([line[0].ljust(widths[0]), *(x.rjust(w) for x, w in zip(line[1:], widths[1:], strict=True))])
        for line in lines
    ]
    text.insert(1, "-" * len(text[0]))
    text += [f"{result.hook}: {remark}" for result in outcome.results if (remark := remark_on(result))]
    return "\n".join(line.rstrip() for line in text)


def remark_on(result: HookResult) -> str:
    """Why a row is incomplete; empty for one that is not."""
    if result.status == "failed":
        return f"failed after {len(result.records)} steps: {result.error}"
    if result.status == "interrupted":
        return f"stopped after {len(result.records)} steps"
    return "not run" if result.status == "not run" else ""


def notes(outcome: Outcome) -> list[str]:
    """How to read the table: what was emulated, what speed-ups refer to, what the times leave out."""
    settings = outcome.settings
    said = []
    if outcome.link:
        said.append(
            f"The link is emulated ({outcome.link}): every collective takes at least sent bytes / bandwidth + latency."
        )
    if outcome.baseline:
        missing = "" if outcome.baseline.name == "allreduce" else ", the first hook, because allreduce was not run"
        said.append(f"Speed-up is against {outcome.baseline.hook}{missing}.")
    said += [
        f"{result.hook} ran as {result.ran_as}: it compresses from the first step on."
        for result in outcome.results
        if result.ran_as != result.hook
    ]
    said += [
        f"{result.hook} sends nothing: its row shows a step without communication, not a way to train."
        for result in outcome.results
        if _silent(result)
    ]
    said.append(
        f"Step time is the median of steps {settings['warmup'] + 1} to {settings['steps']}; "
        "loss is in nats per byte; bytes are what one rank sends."
    )
    return said


def verdict(outcome: Outcome) -> str:
    """What the numbers say, also where compression does not pay; empty where nothing can be compared."""
    base = outcome.baseline
    others = [x for x in outcome.results if x is not base and x.status == "done" and x.step_seconds and not _silent(x)]
    if base is None or base.status != "done" or not others:
        return ""
    link = "emulated link" if outcome.link else "machine" if outcome.setup.get("machines") == 1 else "network"
    speeds = {id(x): outcome.speedup(x) or 0.0 for x in others}
    faster = sorted((x for x in others if speeds[id(x)] > 1 + _SAME), key=lambda x: -speeds[id(x)])
    slower = [x for x in others if speeds[id(x)] < 1 - _SAME]
    parts = []
    if faster:
        best = faster[0]
        parts.append(
            f"{best.hook} is the fastest, {_format.times(speeds[id(best)])} as fast as {base.hook}"
            f"{_loss_remark(best, base)}"
        )
    if slower:
        which = _join([f"{x.hook} ({_format.times(speeds[id(x)])})" for x in slower])
        parts.append(f"{which} {'is' if len(slower) == 1 else 'are'} slower than {base.hook}: {_why(slower)}")
    if not parts:
        parts.append(f"no hook is measurably faster than {base.hook}: compression does not pay here")
    return f"On this {link} {'; '.join(parts)}."


def _silent(result: HookResult) -> bool:
    """Whether it sent nothing where an all-reduce would have: a floor to compare with, no way to train."""
    return result.compression == math.inf


def _why(slower: list[HookResult]) -> str:
    """Compression is to blame only where there was some."""
    compressed = statistics.fmean((x.compression or 1.0) for x in slower) > 1
    return "compression does not pay here" if compressed else "it sends no less"


def _loss_remark(result: HookResult, base: HookResult) -> str:
    if result.validation_loss is None or base.validation_loss is None:
        return ""
    more = result.validation_loss - base.validation_loss
    if more <= _WORSE_LOSS * base.validation_loss:
        return ""
    return f", at a held-out loss {more:.3f} higher after the same steps"


def _join(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
