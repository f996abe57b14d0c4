"""Print and write what was measured: the table, the JSON file, the report."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from commhub.bench import _table

from ._check import NO_MATPLOTLIB
from ._document import document
from ._format import printable
from ._verdict import verdict

if TYPE_CHECKING:
    from collections.abc import Callable

    from ._results import Outcome


def finish(outcome: Outcome, *, stopped: int) -> int:
    """Show ``outcome`` and write the files that its settings name.

    Files of an earlier bench stay as they are where nothing was measured before it was stopped.

    Returns:
        The exit code: ``stopped`` where the bench was stopped, else 1 where a hook failed or a file could not be
        written, else 0.
    """
    if not outcome.measured and stopped:
        print("Nothing was measured.", flush=True)
        return stopped
    _say(f"\n{_table.table(outcome)}\n")
    for line in filter(None, [*_table.notes(outcome), verdict(outcome)]):
        _say(line)
    kept = _write("JSON", outcome.settings["json"], lambda: json.dumps(document(outcome), indent=1) + "\n")
    if outcome.trace is not None:
        kept &= _write("Timeline", outcome.settings["timeline"], lambda: json.dumps(outcome.trace))
    kept &= _write("Report", outcome.settings["report"], lambda: _html(outcome))
    if outcome.settings["report"] is None:
        print(f"No report: {NO_MATPLOTLIB}")
    sys.stdout.flush()
    return stopped or int(outcome.failed or not kept)


def _say(text: str) -> None:
    print(printable(text, sys.stdout))


def _write(what: str, name: str | None, content: Callable[[], str]) -> bool:
    """Write one file, if it has a name; whether it could be written."""
    if not name:
        return True
    try:
        Path(name).write_text(content(), encoding="utf-8")
    except OSError as err:
        print(f"commhub bench: {name} could not be written: {err.strerror}", file=sys.stderr)
        return False
    _say(f"{what}: {name}")
    return True


def _html(outcome: Outcome) -> str:
    # Imported late: matplotlib takes a second to load, and is optional.
    from ._report import html

    return printable(html(outcome))
