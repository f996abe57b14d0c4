"""The command line. A command's module is imported when that command runs, so that the others stay quick."""

from __future__ import annotations

import warnings

import click

import commhub

from ._group import LazyGroup

__all__ = ["main"]

_COMMANDS = {
    "bench": ("commhub.cli._bench:bench", "Train real data under several hooks and compare them."),
    "check": ("commhub.cli._check:check", "Run the conformance suite against one hook."),
    "doctor": ("commhub.cli._doctor:doctor", "Load every plugin apart and say what is wrong."),
    "enum": ("commhub.cli._enum:enum", "Write or check a module of names for editors and type checkers."),
    "info": ("commhub.cli._info:info", "Describe one hook: options, needs, bytes, reference."),
    "list": ("commhub.cli._list:list_", "Show what is installed here."),
    "new": ("commhub.cli._new:new", "Start a new plugin package."),
}


@click.group(cls=LazyGroup, commands_at=_COMMANDS, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(commhub.__version__, prog_name="commhub")
def main() -> None:
    """Gradient communication hooks for data-parallel PyTorch: one hook per plugin.

    Exit codes: 0 done, 1 the answer is no, 2 wrong usage.
    """
    warnings.filterwarnings("ignore", message="Failed to initialize NumPy")  # torch's, and no concern of ours
