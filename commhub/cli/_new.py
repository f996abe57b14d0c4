"""``commhub new``: start a plugin package that works as it comes."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from commhub.registry._index import Kind


class _WrongUsage(click.ClickException):
    """Exit code 2 in one line, without click's two lines on usage: the usage was right, the name was not."""

    exit_code = 2


@click.command()
@click.argument("name")
@click.option("--averager", is_flag=True, help="An averager of parameters instead of a hook.")
@click.option(
    "--directory",
    type=click.Path(path_type=Path),
    default=Path(),
    metavar="PATH",
    help="Make the folder in this one.  [default: here]",
)
@click.option("--author", metavar="TEXT", help="Who owns it.  [default: the authors of commhub-NAME]")
def new(name: str, averager: bool, directory: Path, author: str | None) -> None:
    """Start the plugin package commhub-NAME: a hook to edit, its spec, tests, README, licence and CI.

    NAME is what users will write, such as my-hook. The package installs, shows in 'commhub list', passes its
    tests and builds as it comes. Nothing that exists is overwritten.
    """
    from commhub.scaffold import Names, write  # only this command needs it

    kind: Kind = "averager" if averager else "hook"
    try:
        names = Names.of(name)
        if not directory.is_dir():
            raise ValueError(f"{directory} is no folder: make it first.")
        names.check_free()
        if author is None:
            author = f"The authors of {names.distribution}"
        folder, files = write(names, kind, directory, author)
    except ValueError as err:
        raise _WrongUsage(str(err)) from err
    click.echo(f"Made {folder}, which offers the {kind} {names.hook!r}:\n")
    click.echo("\n".join(f"  {file}" for file in files))
    place = str(folder) if folder.is_absolute() else f"./{folder}"
    click.echo("\nNext:\n")
    click.echo(f"  python -m pip install -e {shlex.quote(f'{place}[test]')}")
    click.echo(f"  commhub list {names.hook}")
    click.echo(f"  python -m pytest {shlex.quote(place)}")
