"""What the commands share: where the answer goes, plain aligned columns, JSON, and completion of names.

Whatever a plugin says is escaped here, where it is printed, and nowhere else; JSON has it as it is.
"""

from __future__ import annotations

import contextlib
import math
import os
import sys
from typing import TYPE_CHECKING, Any, TextIO

import click

from commhub._printable import visible

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

__all__ = ["ENDS_PROCESS", "Answering", "complete_names", "print_json", "print_row", "print_table", "say"]

ENDS_PROCESS = "the process ends with this command"
"""The context's object where that is so."""
_answers: list[TextIO] = []
"""Where the running command's answer goes; stdout where no command runs."""
_replaced: list[object] = []
"""Streams that plugins put in the place of ours: one that is forgotten closes the file beneath it."""


class Answering(click.Command):
    """A command whose stdout holds its answer alone: what plugins write there, in whatever way, goes to stderr."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; where it is all that this process does, stdout stays apart for what ends later."""
        with _apart(for_good=ctx.obj is ENDS_PROCESS):
            return super().invoke(ctx)


@contextlib.contextmanager
def _apart(*, for_good: bool) -> Iterator[None]:
    """Keep stdout for ``say``; for all others, C libraries and subprocesses too, it is stderr.

    Args:
        for_good: also afterwards, when threads and exit handlers of plugins still write.
    """
    out, err = sys.stdout, sys.stderr
    with contextlib.ExitStack() as stack:
        _answers.append(stack.enter_context(_private_stdout(out, for_good=for_good)))
        stack.callback(_answers.pop)
        sys.stdout = err
        try:
            yield
        finally:
            _replaced.extend(stream for stream in (sys.stdout, sys.stderr) if stream not in (out, err))
            sys.stdout, sys.stderr = out, err


@contextlib.contextmanager
def _private_stdout(stream: TextIO, *, for_good: bool) -> Iterator[TextIO]:
    """A file of our own that leads where stdout does, while descriptor 1 leads where 2 does.

    A stream that is not descriptor 1, such as a test's, is private already.
    """
    if not _is_descriptor_1(stream):
        yield stream
        return
    stream.flush()
    with os.fdopen(os.dup(1), "w", encoding=stream.encoding, errors=stream.errors) as answer:
        _to_stderr()
        try:
            yield answer
            answer.flush()
        finally:
            if not for_good:
                os.dup2(answer.fileno(), 1)


def _is_descriptor_1(stream: TextIO) -> bool:
    try:
        return stream.fileno() == 1
    except (OSError, ValueError, AttributeError):
        return False


def _to_stderr() -> None:
    try:
        os.dup2(2, 1)
    except OSError:  # stderr is closed
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        if nowhere != 1:
            os.close(nowhere)


def say(text: str = "") -> None:
    """Print lines of the answer, what cannot be shown in them escaped."""
    answer = _stream()
    click.echo(_encodable(answer)(visible(text, keep="\n\t")), file=answer)


def print_table(rows: Iterable[Sequence[str]], header: Sequence[str] = ()) -> None:
    """Print rows as left-aligned columns two blanks apart."""
    shown = _shown()
    table = [[shown(cell) for cell in row] for row in ([header, *rows] if header else rows)]
    widths = [max(map(_width, column)) for column in zip(*table, strict=True)]
    say("\n".join("  ".join(map(_padded, row, widths)).rstrip() for row in table))


def print_row(row: Sequence[str], widths: Sequence[int]) -> None:
    """Print one row of a table that is not complete yet; the last column takes what it needs."""
    say("  ".join(map(_padded, map(_shown(), row), (*widths, 0))).rstrip())


def print_json(rows: Sequence[object]) -> None:
    """Print a JSON list: plain ASCII, whatever is in it."""
    import json  # only --json pays for it

    say(json.dumps(_jsonable(rows), indent=2, default=str))


def complete_names(_ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[str]:
    """Return the installed names that begin like ``incomplete``; case and dashes do not matter.

    What no spec can be called is left out: a shell would take it for several words, or worse.
    """
    from commhub.registry import _lookup
    from commhub.registry._hookstring import canonical_name
    from commhub.registry._spec import is_name

    return [name for name in _lookup.names() if name.startswith(canonical_name(incomplete)) and is_name(name)]


def _stream() -> TextIO:
    return _answers[-1] if _answers else sys.stdout


def _encodable(stream: TextIO) -> Callable[[str], str]:
    """Escapes what the stream's encoding lacks."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return lambda text: text if text.isascii() else text.encode(encoding, "backslashreplace").decode(encoding)


def _shown() -> Callable[[str], str]:
    """A cell's text as it will stand on the terminal, in one line."""
    encodable = _encodable(_stream())
    return lambda text: encodable(visible(text))


def _padded(text: str, width: int) -> str:
    return text + " " * (width - _width(text))


def _width(text: str) -> int:
    """The columns that a terminal gives the text."""
    if text.isascii():
        return len(text)
    from unicodedata import combining, east_asian_width

    return sum(0 if combining(x) else 2 if east_asian_width(x) in "WF" else 1 for x in text)


def _jsonable(value: object) -> object:
    """The value with keys and numbers that JSON has: other keys, infinity and NaN become text."""
    if isinstance(value, dict):
        plain = (str, int, float, bool, type(None))
        return {key if isinstance(key, plain) else str(key): _jsonable(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(entry) for entry in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
