"""The table at the end, and how to read it. Plain text, no rich."""

from __future__ import annotations

from typing import TYPE_CHECKING

from commhub.bench import _format

from ._limits import limits

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ._results import HookResult, Outcome

HEADER = ("hook", "loss", "val. loss", "step time", "sent / step", "compression", "speed-up")
LIMITS = (
    "hook",
    "step time",
    "/ {base} (95 %)",
    "floor",
    "over floor",
    "bus",
    "hidden",
    "extra CPU",
    "sent",
    "interface",
)
_LIMITS_MEAN = (
    "Floor: a step without communication, or sent bytes / bandwidth where that is more. Bus: sent bytes over the time "
    "in which messages were under way. Hidden: the share of communication that training did not wait for. Extra CPU: "
    "beyond a step without communication. Interface: what left a host, headers too."
)


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
    """Aligned columns, numbers to the right; the same of steps timed in turn; a line for each hook that did not end."""
    text = _aligned([HEADER, *rows(outcome)])
    timed = limit_rows(outcome)
    if timed:
        base = outcome.baseline
        header = [name.format(base=base.hook if base else "") for name in LIMITS]
        kept = [place for place in range(len(header)) if any(row[place] != _format.NOTHING for row in timed)]
        text += ["", *_aligned([[line[place] for place in kept] for line in (header, *timed)])]
    text += [f"{result.hook}: {remark}" for result in outcome.results if (remark := remark_on(result))]
    return "\n".join(line.rstrip() for line in text)


def limit_rows(outcome: Outcome) -> list[tuple[str, ...]]:
    """One row of texts for each hook that was timed in turn with others, in the order of ``LIMITS``."""
    made: list[tuple[str, ...]] = []
    for result in outcome.results:
        found = limits(outcome, result)
        if found is None:
            continue
        made.append(
            (
                result.hook,
                _format.seconds(result.step_seconds),
                _format.interval(found.ratio),
                _format.seconds(found.floor_seconds),
                _format.times(found.over_floor),
                _format.rate(found.bus_bits_per_second),
                _format.share(found.hidden),
                _format.seconds(found.extra_cpu_seconds),
                _format.size(result.sent_bytes),
                _format.size(found.interface_bytes),
            )
        )
    return made


def _aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    text = [
        "  ".join([line[0].ljust(widths[0]), *(x.rjust(w) for x, w in zip(line[1:], widths[1:], strict=True))])
        for line in lines
    ]
    text.insert(1, "-" * len(text[0]))
    return text


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
    said = list(outcome.remarks)
    if outcome.hosts:
        said.append(f"The link: {outcome.told_link}.")
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
    timed = f"steps {settings['warmup'] + 1} to {settings['steps']}"
    if any(result.race for result in outcome.results):
        timed = f"{settings['repeats']} steps, one of each hook in turn, in an order shuffled in every round"
    said.append(f"Step time is the median of {timed}; loss is in nats per byte; bytes are what one rank sends.")
    if limit_rows(outcome):
        said.append(_LIMITS_MEAN)
    return said
