"""Find the text to train on and read it as bytes.

No torch: a missing file has to be reported before any process starts.
"""

from __future__ import annotations

import math
import os
import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

MAX_BYTES = 16 * 2**20
"""At most this much text is read: enough for hours of training, little enough to hold in every rank."""

HELD_OUT = 0.05
"""The share of the text, at its end, that is never trained on."""

_NOT_STDLIB = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"})
"""Folders below the standard library that hold other people's packages, or tests (half of its bytes)."""


def read_text(data: str | None, *, limit: int = MAX_BYTES) -> bytes:
    """The text as bytes: of a file, of all text files in a folder, or (``None``) of Python's standard library.

    Folders are walked in sorted order and their files joined by newlines, so that every rank reads the same
    bytes. Hidden, unreadable and binary files (a NUL byte near the start) of a folder are left out.

    Raises:
        FileNotFoundError: if ``data`` does not exist.
        OSError: if it is a file that cannot be read.
        ValueError: if there is nothing to read in it.
    """
    if data is None:
        files = (file for file in _walk(Path(sysconfig.get_paths()["stdlib"])) if file.suffix == ".py")
        text = _join(files, limit)
    elif not Path(data).exists():
        raise FileNotFoundError(f"no such file or folder: {data}")
    elif Path(data).is_dir():
        text = _join(_walk(Path(data), skip=frozenset()), limit)
    else:
        with Path(data).open("rb") as file:
            text = file.read(limit)
    if not text:
        raise ValueError(f"no text found in {data or 'the standard library of this Python'}")
    return text


def required_bytes(*, context: int, batch: int, world_size: int) -> int:
    """The least length of text with one global batch to train on and one window held out."""
    train = (world_size * batch * context + 1) / (1 - HELD_OUT)
    held_out = (context + 1) / HELD_OUT
    return math.ceil(max(train, held_out)) + 1


def _walk(root: Path, skip: frozenset[str] = _NOT_STDLIB) -> Iterator[Path]:
    for folder, names, files in os.walk(root):
        names[:] = sorted(name for name in names if not name.startswith(".") and name not in skip)
        yield from (Path(folder, name) for name in sorted(files) if not name.startswith("."))


def _join(files: Iterator[Path], limit: int) -> bytes:
    text = bytearray()
    for file in files:
        text += _content(file, limit - len(text))
        if len(text) >= limit:
            break
        if text and not text.endswith(b"\n"):
            text += b"\n"
    return bytes(text)


def _content(file: Path, limit: int) -> bytes:
    try:
        if not file.is_file():  # a pipe would be waited on for ever
            return b""
        with file.open("rb") as opened:
            head = opened.read(1024)
            return b"" if b"\0" in head else (head + opened.read(limit))[:limit]
    except OSError:
        return b""
