"""``commhub doctor``: load every plugin in a process of its own, and say what is wrong with it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from commhub.registry import _index, _lookup
from commhub.registry._probe import Finding, examine

from ._output import Answering, print_json, print_table, say

if TYPE_CHECKING:
    from commhub.registry._lookup import Standing

_COLUMNS = ("name", "package", "version", "status", "import", "imports torch")


@click.command(cls=Answering)
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list of objects.")
def doctor(as_json: bool) -> None:
    """Load every plugin apart: status, import time, whether it imports torch, traceback.

    A plugin's specs should load in milliseconds and without torch. Exits with 1 if a plugin is broken.
    """
    found: dict[tuple[str, str], Finding] = {}
    rows = []
    for standing in _lookup.standings():
        claim, finding = standing.claim, None
        if standing.status not in {"disabled", "incompatible"}:
            if claim.plugin not in found:
                found[claim.plugin] = examine(_index.siblings(claim))
            finding = found[claim.plugin]
        rows.append(_row(standing, finding))
    if as_json:
        print_json(rows)
    else:
        _print(rows, found)
    if any(row["status"] == "broken" for row in rows):
        raise SystemExit(1)


def _row(standing: Standing, finding: Finding | None) -> dict[str, object]:
    claim = standing.claim
    broken = finding is not None and finding["error"] is not None
    return {
        "name": claim.name,
        "kind": claim.kind,
        "distribution": claim.distribution,
        "version": claim.version,
        "status": "broken" if broken else standing.status,
        "summary": finding["summaries"].get(claim.name, "") if finding else "",
        "error": finding["error"] if finding and broken else standing.reason,
        "module": claim.module,
        "location": claim.location,
        "import_ms": finding["import_ms"] if finding else None,
        "imports_torch": finding["imports_torch"] if finding else None,
        "traceback": finding["traceback"] if finding else None,
    }


def _print(rows: list[dict[str, object]], found: dict[tuple[str, str], Finding]) -> None:
    table = [
        (
            str(row["name"]),
            str(row["distribution"]),
            str(row["version"]),
            str(row["status"]),
            "-" if row["import_ms"] is None else f"{row['import_ms']} ms",
            "yes" if row["imports_torch"] else "-" if row["imports_torch"] is None else "no",
        )
        for row in rows
    ]
    if table:
        print_table(table, _COLUMNS)
    for (distribution, module), finding in found.items():
        if finding["error"] is not None:
            say(f"\n{distribution}, {module}: {finding['error']}\n{finding['traceback'] or ''}".rstrip())
    broken = sorted({str(row["distribution"]) for row in rows if row["status"] == "broken"})
    say(f"\n{len(rows)} names, {len(found)} plugins loaded, broken: {', '.join(broken) or 'none'}")
