"""``commhub list``: one line per name that an installed package claims."""

from __future__ import annotations

from fnmatch import fnmatchcase

import click

from commhub.registry import _lookup, _registry

from ._output import Answering, complete_names, print_json, print_table

_COLUMNS = ("name", "kind", "package", "version", "status", "summary")


@click.command("list", cls=Answering)
@click.argument("pattern", required=False, shell_complete=complete_names)
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list of objects.")
def list_(pattern: str | None, as_json: bool) -> None:
    """Show what is installed here: hooks and averagers, usable or not.

    PATTERN selects names and packages: part of one, or a glob such as 'quantize*'; case and dashes do not
    matter.

    A name is all that a training script or a framework's configuration needs: commhub.register(model, NAME).
    docs/frameworks.md has a guide each to torchrun, Lightning, Fabric, Accelerate, Transformers, PEFT, Ignite,
    Ray Train, Slurm, Kubernetes, and TensorBoard or any other logger.
    """
    rows = [row for row in _registry.installed() if pattern is None or _matches(pattern, row)]
    if as_json:
        print_json([row.as_dict() for row in rows])
    elif rows:
        print_table((_cells(row) for row in rows), _COLUMNS)
    elif pattern is not None:
        click.echo(f"No installed name or package matches {pattern!r}.", err=True)
    else:
        click.echo("No plugin is installed: pip install 'commhub[all]'", err=True)


def _cells(row: _registry.HookInfo) -> tuple[str, ...]:
    text = row.summary if row.error is None else " ".join(row.error.split())
    return row.name, row.kind, row.distribution, row.version, row.status, text


def _matches(pattern: str, row: _registry.HookInfo) -> bool:
    wanted = _lookup.canonical(pattern)
    glob = wanted if any(mark in wanted for mark in "*?[") else f"*{wanted}*"
    return fnmatchcase(row.name, glob) or fnmatchcase(row.distribution.replace("-", "_"), glob)
