"""The report: one HTML file with the table, two charts and how it was run, that needs nothing but itself."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

from commhub.bench import _format, _table

from ._charts import HOOK_COLOURS, loss_chart, split_chart
from ._verdict import verdict

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ._results import HookResult, Outcome

_CSS = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0; background: #f8fafc; color: #0f172a; line-height: 1.5;
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 920px; margin: 0 auto; padding: 40px 24px 56px; }
h1 { font-size: 26px; line-height: 1.25; margin: 0 0 4px; letter-spacing: -.01em; }
h2 { font-size: 16px; margin: 0 0 12px; }
p { margin: 0; }
.what { color: #475569; }
.verdict { margin: 20px 0 0; font-size: 17px; font-weight: 600; }
.emulated { display: inline-block; margin-top: 16px; padding: 3px 12px; border-radius: 999px;
  background: #fef3c7; color: #78350f; font-weight: 600; font-size: 13px; }
section { margin-top: 24px; padding: 20px 24px; background: #fff; border: 1px solid #e2e8f0;
  border-radius: 10px; }
.scroll { overflow-x: auto; }
table { width: 100%; border-collapse: collapse; font-variant-numeric: tabular-nums; white-space: nowrap; }
th { font-weight: 600; font-size: 13px; color: #475569; }
th, td { padding: 8px 0 8px 18px; text-align: right; border-bottom: 1px solid #e2e8f0; }
th:first-child, td:first-child { padding-left: 0; text-align: left; }
tr:last-child td { border-bottom: 0; }
td:first-child { font-weight: 600; }
td i { display: inline-block; width: 10px; height: 10px; border-radius: 3px; margin-right: 9px; }
tr.part td { color: #475569; font-weight: 400; white-space: normal; }
.notes { margin: 12px 0 0; padding: 0; list-style: none; color: #475569; font-size: 13px; }
svg { display: block; width: 100%; height: auto; }
svg text { font-family: inherit !important; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 6px 24px; margin: 0; font-size: 14px; }
dt { color: #475569; }
dd { margin: 0; overflow-wrap: anywhere; }
code { font: 13px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
@media print { body { background: #fff; } section { break-inside: avoid; } }
"""


def html(outcome: Outcome) -> str:
    """The whole page as text."""
    said = verdict(outcome)
    emulated = f'<p class="emulated">Emulated link: {escape(outcome.link)}</p>' if outcome.link else ""
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>commhub bench</title>
<style>{_CSS}</style>
</head>
<body>
<main>
<h1>commhub bench</h1>
<p class="what">{escape(_what(outcome))}</p>
{emulated}
{f'<p class="verdict">{escape(said)}</p>' if said else ""}
<section>
<h2>Results</h2>
<div class="scroll">{_html_table(outcome)}</div>
<ul class="notes">{"".join(f"<li>{escape(note)}</li>" for note in _table.notes(outcome))}</ul>
</section>
{_charts(outcome)}
<section>
<h2>How it was run</h2>
<dl>{_definitions(_how(outcome))}</dl>
</section>
</main>
</body>
</html>
"""


def _what(outcome: Outcome) -> str:
    settings, setup = outcome.settings, outcome.setup
    if not setup:
        return "Stopped before the ranks were up."
    return (
        f"A byte-level transformer of {_format.count(setup['parameters'])} parameters, trained "
        f"data-parallel on {setup['world_size']} ranks for {settings['steps']} steps under each hook, from "
        "the same initial weights and on the same batches."
    )


def _charts(outcome: Outcome) -> str:
    if not outcome.measured:
        return ""
    return f"""<section>
<h2>Loss against time</h2>
{loss_chart(outcome)}
</section>
<section>
<h2>Where a step's time goes</h2>
{split_chart(outcome)}
<ul class="notes"><li>Encode, wait and decode: how long training stood still for each; what overlaps with
computation costs no time and is not shown.</li></ul>
</section>"""


def _html_table(outcome: Outcome) -> str:
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in _table.HEADER)
    body = []
    for index, (result, row) in enumerate(zip(outcome.results, _table.rows(outcome), strict=True)):
        mark = f'<i style="background:{HOOK_COLOURS[index % len(HOOK_COLOURS)]}"></i>'
        cells = "".join(f"<td>{escape(cell)}</td>" for cell in row[1:])
        body.append(f"<tr><td>{mark}{escape(row[0])}</td>{cells}</tr>")
        if remark := _table.remark_on(result):
            text = escape(f"{result.hook}: {remark}")
            body.append(f'<tr class="part"><td colspan="{len(row)}">{text}</td></tr>')
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"


def _how(outcome: Outcome) -> Iterable[tuple[str, str]]:
    """What someone needs to get comparable figures. No host names, and no paths but the user's."""
    settings, setup, machine = outcome.settings, outcome.setup, outcome.machine
    text = settings["data"] or "source code of the Python standard library"
    yield "Command", f"<code>{escape(outcome.command)}</code>"
    if setup:
        several = "s" if setup["machines"] > 1 else ""
        yield "Text", escape(f"{text}, {_format.size(setup['text_bytes'])}; the last 5 % held out")
        where = f"{setup['machines']} machine{several}"
        yield "Ranks", escape(f"{setup['world_size']} on {where}, {setup['backend']}")
        threads = f"{setup['threads']} thread{'s' if setup['threads'] > 1 else ''}"
        yield "Each rank", escape(f"{setup['device']}, {threads}, torch {setup['torch']}")
    yield "Batch", f"{settings['batch']} windows per rank and step, seed {settings['seed']}"
    yield "Optimizer", escape(settings["optimizer"])
    yield "Link", escape(f"emulated: {outcome.link}" if outcome.link else "as it is, nothing emulated")
    yield "Machine", escape(f"{machine['system']}, {machine['cores']} cores")
    yield "Versions", escape(f"commhub {machine['commhub']}, Python {machine['python']}")
    yield "Median step", "".join(f"<div>{escape(_parts(result))}</div>" for result in outcome.results)


def _parts(result: HookResult) -> str:
    parts = ", ".join(f"{part} {_format.seconds(value)}" for part, value in result.split.items())
    return f"{result.hook}: {parts or 'not measured'}"


def _definitions(pairs: Iterable[tuple[str, str]]) -> str:
    return "".join(f"<dt>{term}</dt><dd>{text}</dd>" for term, text in pairs if text)
