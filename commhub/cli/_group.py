"""A command group that imports a command only to run it, and gives every error of commhub's an exit code."""

from __future__ import annotations

import os
import sys
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, cast

import click

from commhub._errors import CommhubError, HookOptionError
from commhub._printable import message_of

from ._output import ENDS_PROCESS

if TYPE_CHECKING:
    from collections.abc import Mapping

    from click.shell_completion import CompletionItem

__all__ = ["LazyGroup"]


class LazyGroup(click.Group):
    """A group of commands named as ``"module:function"``, each with a line of help that needs no import."""

    def __init__(self, *args: Any, commands_at: Mapping[str, tuple[str, str]], **settings: Any) -> None:
        super().__init__(*args, **settings)
        self._at = commands_at

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's signature
        """Return the commands that this installation has."""
        return [name for name, (home, _) in sorted(self._at.items()) if find_spec(home.partition(":")[0])]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the command that is about to run."""
        if cmd_name not in self.list_commands(ctx):
            return None
        module, _, function = self._at[cmd_name][0].partition(":")
        return cast("click.Command", getattr(import_module(module), function))

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the list of commands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, self._at[name][1]) for name in self.list_commands(ctx)])

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Complete command names without importing them."""
        from click.shell_completion import CompletionItem

        found = [name for name in self.list_commands(ctx) if name.startswith(incomplete)]
        commands = [CompletionItem(name, help=self._at[name][1]) for name in found]
        return commands + click.Command.shell_complete(self, ctx, incomplete)

    def main(self, *args: Any, **extra: Any) -> Any:
        """Run the command line as this process, or, not standalone, as a call that returns."""
        if extra.get("standalone_mode", True) and sys.stdout is sys.__stdout__:
            extra.setdefault("obj", ENDS_PROCESS)
        return super().main(*args, **extra)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command: wrong usage exits with 2, any other error of commhub's with 1."""
        try:
            return super().invoke(ctx)
        except HookOptionError as err:
            raise click.UsageError(message_of(err)) from err
        except CommhubError as err:
            raise click.ClickException(message_of(err)) from err
        except BrokenPipeError:
            # The reader has seen enough (`commhub list | head`); keep the interpreter's last flush quiet too.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return None
