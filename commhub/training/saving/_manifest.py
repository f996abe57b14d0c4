"""The manifest of a checkpoint's directory: which files are the checkpoint, with their checksums and its own."""

from __future__ import annotations

import hashlib
import json
import re
from typing import TYPE_CHECKING, Any

import attrs

from commhub._errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

FORMAT = 1
DATA = re.compile(r"commhub-(?:([a-z0-9-]+)-)?rank(0|[1-9]\d*)-[0-9a-f]{16}\.pt")
"""The name of a file: part of the model, if it has several, and rank."""


@attrs.frozen
class Entry:
    """One rank's file, as the manifest names it."""

    file: str
    bytes: int
    blake2b: str


@attrs.frozen
class Manifest:
    """Which files are the checkpoint, by part of the model and in rank order; ``checksum`` is its own."""

    hook: str
    step: int
    parts: Mapping[str, tuple[Entry, ...]]
    checksum: str

    @classmethod
    def read(cls, text: bytes) -> Manifest:
        """From the form that it has in its file.

        Raises:
            CheckpointError: if it is no manifest, or damaged; other errors where it is no JSON or lacks something.
        """
        body = json.loads(text)
        known = {"commhub", "hook", "step", "checksum"}
        if not isinstance(body, dict) or not body.keys() >= known or ("ranks" in body) == ("parts" in body):
            raise CheckpointError("it is no manifest of a checkpoint.")
        told = body.pop("checksum")
        if told != checksum(body):
            raise CheckpointError("its checksum is wrong: it was changed since it was written.")
        if body["commhub"] != FORMAT:
            raise CheckpointError(f"it is of format {body['commhub']!r}, which this version of commhub does not know.")
        named = body["parts"] if "parts" in body else {"": body["ranks"]}
        parts = {part: tuple(Entry(**entry) for entry in entries) for part, entries in named.items()}
        if not all([*parts.values(), parts]):
            raise CheckpointError("it names no file.")
        for part, ranks in parts.items():
            for rank, entry in enumerate(ranks):
                name = DATA.fullmatch(entry.file)
                if name is None or (name[1] or "", int(name[2])) != (part, rank):
                    raise CheckpointError(f"it names {entry.file!r} as rank {rank}'s file.")
        return cls(body["hook"], body["step"], parts, told)

    @property
    def files(self) -> set[str]:
        """The names of all files."""
        return {entry.file for ranks in self.parts.values() for entry in ranks}


def written(hook: str, step: int, parts: Mapping[str, Sequence[Entry]]) -> dict[str, Any]:
    """The content of its file."""
    named = {part: [attrs.asdict(entry) for entry in ranks] for part, ranks in parts.items()}
    body = {"commhub": FORMAT, "hook": hook, "step": step}
    body |= {"ranks": named[""]} if named.keys() == {""} else {"parts": named}
    return {**body, "checksum": checksum(body)}


def checksum(body: Mapping[str, Any]) -> str:
    """Of all else that the file holds."""
    return hashlib.blake2b(json.dumps(body, sort_keys=True).encode(), digest_size=32).hexdigest()
