"""The table at the end, and how to read it. Plain text, no rich."""

from __future__ import annotations

from typing import TYPE_CHECKING

from commhub.bench import _format

if TYPE_CHECKING:
    from ._results import HookResult, Outcome

HEADER = ("hook", "loss", "val. loss", "step time", "sent / step", "compression", "speed-up")


def rows(outcome: Outcome) -> list[tuple[str, ...]]:
    """One row of texts per hook, in the order of ``HEADER``; what was not measured is a dash."""
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
        if result.silent
    ]
    said.append(
        f"Step time is the median of steps {settings['warmup'] + 1} to {settings['steps']}; "
        "loss is in nats per byte; bytes are what one rank sends."
    )
    return said
