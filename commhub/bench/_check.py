"""Refuse what cannot work before any process starts, each with one line. Imports no torch."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import attrs

from commhub._errors import CommhubError
from commhub.bench import _hooks, _pytorch

from ._options import DEFAULT_REPORT, BenchError, Settings
from ._sizes import SIZES
from ._text import read_text, required_bytes

NO_MATPLOTLIB = "the report needs matplotlib: pip install commhub[bench]"


def checked(settings: Settings, *, world_size: int) -> Settings:
    """The same settings with hooks in canonical form and the report's file decided on.

    Raises:
        BenchError: for an unknown hook, a wrong option, an unreadable link, a missing or too short text, no place to
            write to, a report that was asked for and cannot be drawn, or ranks that make no whole groups of shards.
    """
    try:
        _hooks.network(settings)
    except ValueError as err:
        raise BenchError(f"--{err}") from err
    if world_size % settings.shard:
        raise BenchError(f"--shard {settings.shard}: {world_size} ranks make no whole groups of that many")
    if settings.shard > 1 and settings.bucket_cap_mb is not None:
        raise BenchError("--bucket-cap-mb is DDP's; with --shard each block of the model is a bucket")
    try:
        hooks = tuple(_hooks.in_canonical_form(hook) for hook in settings.hooks)
    except CommhubError as err:
        raise BenchError(" ".join(str(err).split())) from err
    theirs = [hook for hook in hooks if _pytorch.is_pytorchs(hook)]
    if theirs and settings.shard > 1:
        raise BenchError(f"{theirs[0]} is a hook for DDP; leave it out, or --shard")
    if theirs and settings.emulated and settings.hosts == 1:
        raise BenchError(f"{theirs[0]} communicates past an emulated link; use --hosts, or leave it out")
    for flag, file in (("--json", settings.json), ("--timeline", settings.timeline), ("--report", settings.report)):
        if file and (not Path(file).resolve().parent.is_dir() or Path(file).is_dir()):
            raise BenchError(f"{flag} {file} cannot be written: {_no_place(Path(file))}")
    _check_text(settings, world_size)
    return attrs.evolve(settings, hooks=hooks, report=_report(settings.report))


def _report(wanted: str | None) -> str | None:
    """The file to draw: what was asked for ("" is none), else the default; None where none can be drawn."""
    if importlib.util.find_spec("matplotlib") is not None:
        return DEFAULT_REPORT if wanted is None else wanted
    if wanted:
        raise BenchError(NO_MATPLOTLIB)
    return wanted


def _no_place(file: Path) -> str:
    return "it is a folder" if file.is_dir() else "its folder does not exist"


def _check_text(settings: Settings, world_size: int) -> None:
    try:
        found = len(read_text(settings.data))
    except (OSError, ValueError) as err:
        raise BenchError(f"--data: {err}") from err
    needed = required_bytes(context=SIZES[settings.model].context, batch=settings.batch, world_size=world_size)
    if found < needed:
        raise BenchError(
            f"the text has {found:,} bytes; {world_size} ranks with --batch {settings.batch} and --model "
            f"{settings.model} need {needed:,}"
        )
