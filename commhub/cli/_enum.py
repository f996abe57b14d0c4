"""``commhub enum``: names as a Python module, for editors and type checkers."""

from __future__ import annotations

from pathlib import Path

import click

from commhub.registry._enum import documented_source, installed_source


@click.command()
@click.option("--write", type=click.Path(path_type=Path, dir_okay=False), help="Write the module here.")
@click.option("--check", type=click.Path(path_type=Path, dir_okay=False), help="Exit with 1 if it is stale.")
@click.option("--documented", is_flag=True, hidden=True, help="The documented names instead.")
def enum(write: Path | None, check: Path | None, documented: bool) -> None:
    """Write a module with the names that are installed here, as an enum and a Literal, or check one."""
    if (write is None) == (check is None):
        raise click.UsageError("Give either --write PATH or --check PATH.")
    text = documented_source() if documented else installed_source()
    if write is not None:
        write.write_text(text, encoding="utf-8")
        return
    assert check is not None
    if not check.exists() or check.read_text(encoding="utf-8") != text:
        raise click.ClickException(f"{check} is stale: run commhub enum --write {check}")
