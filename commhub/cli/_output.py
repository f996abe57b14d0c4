"""What the commands share: plain aligned columns, JSON, and completion of names."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from typing import TYPE_CHECKING, TextIO

import click

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

__all__ = ["complete_names", "plugins_print_to_stderr", "print_json", "print_row", "print_table"]


def plugins_print_to_stderr() -> redirect_stdout[TextIO]:
    """Keep what a plugin prints while its specs are loaded out of tables and JSON."""
    return redirect_stdout(sys.stderr)


def print_table(rows: Iterable[Sequence[str]], header: Sequence[str] = ()) -> None:
    """Print rows as left-aligned columns two blanks apart."""
    table = [list(header), *map(list, rows)] if header else [*map(list, rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = ("  ".join(map(str.ljust, row, widths)).rstrip() for row in table)
    click.echo("\n".join(lines))


def print_row(row: Sequence[str], widths: Sequence[int]) -> None:
    """Print one row of a table that is not complete yet; the last column takes what it needs."""
    click.echo("  ".join(map(str.ljust, row, (*widths, 0))).rstrip())


def print_json(rows: Sequence[object]) -> None:
    """Print a JSON list."""
    import json  # only --json pays for it

    click.echo(json.dumps(rows, indent=2, default=str))


def complete_names(_ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[str]:
    """Return the installed names that begin like ``incomplete``; case and dashes do not matter."""
    from commhub.registry import _lookup
    from commhub.registry._hookstring import canonical_name

    return [name for name in _lookup.names() if name.startswith(canonical_name(incomplete))]
