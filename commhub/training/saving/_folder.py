"""A checkpoint's directory: one file per rank and a manifest that says which files are the checkpoint.

It is replaced as a whole, for all parts of a model. Every rank writes a file under a new name; when all are complete
one rank replaces the manifest, which is one operation of the file system, and only then removes what the former
manifest named. A process may be killed between any two operations: what the manifest names is complete, and what it
does not name is removed by the next save. Files of others in the directory are left alone.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import secrets
import stat
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, BinaryIO, TypeVar, cast

import attrs
import torch

from commhub._errors import CheckpointError, described
from commhub._printable import shown

from ._manifest import DATA, Entry, Manifest, written
from ._saved import Saved
from ._saving import Part, assemble, of_other_part

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

T = TypeVar("T")

MANIFEST = "commhub.json"
_LIMIT = 2**26  # bytes of a manifest: a rank takes about 200 of them
_ADVICE = "Load another checkpoint, or go on without: then what the hook remembered is lost."


class Folder:
    """A directory that all ranks see. Nothing here communicates: the ranks agree on when to call what.

    Args:
        directory: its path.
        part: of the model, which this rank saves and loads; empty for all of it.

    Raises:
        CheckpointError: whatever goes wrong, in every method, with the file's name.
    """

    def __init__(self, directory: str | Path, part: str = "") -> None:
        self.part = part
        try:
            self.path = Path(directory)
            os.fsencode(self.path)
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"{shown(directory)} is no path of a directory ({error}).") from error
        if "\0" in str(self.path):
            raise CheckpointError(f"{shown(directory)} is no path of a directory.")

    # Saving: `make` everywhere, `tidy` on one rank, `write` everywhere, `switch` on one rank.

    def make(self) -> None:
        """Make the directory if it is not there."""
        try:
            missing = [one for one in (self.path, *self.path.parents) if not one.exists()]
            self.path.mkdir(parents=True, exist_ok=True)
            for one in missing:
                _sync(one.parent)
        except OSError as error:
            raise _unwritten(self.path, error) from error

    def tidy(self) -> None:
        """Remove what earlier saves left behind that did not end."""
        try:
            missing = _is_missing(self.path / MANIFEST)
            kept = set() if missing else self.manifest().files
        except (CheckpointError, OSError):
            return  # nobody can tell which files it names; when it is replaced, none of them counts
        self._remove_all_but(kept)

    def write(self, rank: int, state: Mapping[str, Any]) -> Entry:
        """Write one rank's file, beside what is there."""
        part = f"{self.part}-" if self.part else ""
        path = self.path / f"commhub-{part}rank{rank}-{secrets.token_hex(8)}.pt"
        writer: _Hashing | None = None
        try:
            with path.open("xb") as file:
                writer = _Hashing(file)
                torch.save(dict(state), cast("IO[bytes]", writer))
                file.flush()
                os.fsync(file.fileno())
            _sync(self.path)
        except Exception as error:  # noqa: BLE001 - what torch raises here is of any kind
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
            # torch tells of a failed write in words of its own, which say nothing of the disk.
            cause = error if writer is None or writer.error is None else writer.error
            raise _unwritten(path, cause) from cause
        return Entry(path.name, writer.bytes, writer.hash.hexdigest())

    def switch(self, hook: str, step: int, parts: Mapping[str, Sequence[Entry]]) -> None:
        """Make the files of all ranks, by part of the model, the checkpoint; remove those that were it."""
        partial = self.path / f"{MANIFEST}.partial"
        try:
            for part, ranks in parts.items():
                for rank, entry in enumerate(ranks):
                    path = self.path / entry.file
                    if not path.exists() or path.stat().st_size != entry.bytes:
                        raise CheckpointError(
                            f"{path}: rank {rank}{f' of {part}' if part else ''} has written it, and rank 0 does "
                            "not see it there. Save into a directory that all ranks share."
                        )
            with partial.open("w", encoding="utf-8") as file:
                json.dump(written(hook, step, parts), file, indent=1)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, self.path / MANIFEST)
            _sync(self.path)
        except OSError as error:
            raise _unwritten(self.path / MANIFEST, error) from error
        self._remove_all_but({entry.file for ranks in parts.values() for entry in ranks})

    def _remove_all_but(self, kept: set[str]) -> None:
        with contextlib.suppress(OSError):  # what stays is removed next time
            for name in os.listdir(self.path):
                if (DATA.fullmatch(name) and name not in kept) or name == f"{MANIFEST}.partial":
                    with contextlib.suppress(OSError):
                        os.unlink(self.path / name)

    # Loading.

    def manifest(self) -> Manifest:
        """What is the checkpoint here."""
        path = self.path / MANIFEST
        if _is_missing(path):
            raise CheckpointError(
                f"{self.path} holds no hook state: there is no {MANIFEST}. Give the directory that Registration.save() "
                "was given; a first save that did not end leaves none."
            )
        return _reading(path, lambda file: Manifest.read(file.read(_LIMIT)))

    def read(self, rank: int, world_size: int) -> Part:
        """What one of ``world_size`` ranks needs: its own file, or all of its part's if their number was another."""
        manifest = self.manifest()
        if self.part not in manifest.parts:
            raise CheckpointError(f"{self.path} cannot be loaded: {of_other_part(manifest.parts, self.part)}")
        entries = manifest.parts[self.part]
        former = len(entries)
        ranks = [rank] if former == world_size else range(former)
        part = assemble((self._saved(manifest, one) for one in ranks), rank, world_size)
        where = self.path / entries[rank].file if former == world_size else self.path
        return attrs.evolve(part, where=str(where), source=manifest.checksum)

    def _saved(self, manifest: Manifest, rank: int) -> Saved:
        entries = manifest.parts[self.part]
        entry, path = entries[rank], self.path / entries[rank].file
        if _is_missing(path):
            raise CheckpointError(
                f"{self.path} holds the state of {len(entries)} ranks, but rank {rank}'s is missing: "
                f"{path.name}. {_ADVICE}"
            )

        def take(file: BinaryIO) -> Saved:
            size = os.fstat(file.fileno()).st_size
            if size != entry.bytes:
                raise CheckpointError(f"it has {size} bytes of {entry.bytes}.")
            if hashlib.file_digest(cast("Any", file), _new_hash).hexdigest() != entry.blake2b:
                raise CheckpointError("its checksum is wrong: bytes in it have changed since it was written.")
            file.seek(0)
            saved = Saved.of(torch.load(file, map_location="cpu", weights_only=True, mmap=False))
            found = saved.hook, saved.step, saved.world_size, list(saved.local), saved.part
            if found != (manifest.hook, manifest.step, len(entries), [rank], self.part):
                raise CheckpointError(f"it is not what {MANIFEST} says, but of another checkpoint or rank.")
            return attrs.evolve(saved, where=str(path))

        return _reading(path, take)


class _Hashing:
    """A file to write to that adds up what is written, and remembers what went wrong."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.hash = _new_hash()
        self.bytes = 0
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        """Write all of ``data``."""
        try:
            written = self._file.write(data)
        except OSError as error:
            self.error = error
            raise
        self.hash.update(data)
        self.bytes += written
        return written

    def flush(self) -> None:
        """Nothing: the file is flushed once, at its end."""


def _new_hash() -> Any:
    return hashlib.blake2b(digest_size=32)


def _reading(path: Path, take: Callable[[BinaryIO], T]) -> T:
    """What ``take`` makes of the file; a pipe or a device in its place is never waited for."""
    try:
        number = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        with os.fdopen(number, "rb") if stat.S_ISREG(os.fstat(number).st_mode) else _closed(number) as file:
            return take(file)
    except Exception as error:
        lines = str(error).splitlines() or [""]
        told = lines[0] if isinstance(error, CheckpointError) else f"{type(error).__name__}: {lines[0]}"
        raise CheckpointError(f"{path} cannot be loaded: {told} {_ADVICE}") from error


def _is_missing(path: Path) -> bool:
    """Whether there is nothing of that name; what cannot be looked at is not missing."""
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return True
    except OSError:
        return False
    return False


def _closed(number: int) -> Any:
    os.close(number)
    raise CheckpointError("it is no file.")


def _unwritten(path: Path, error: BaseException) -> CheckpointError:
    why = error.strerror if isinstance(error, OSError) and error.strerror else described(error)
    return CheckpointError(f"{path} could not be written: {why}.")


def _sync(directory: Path) -> None:
    """Have the names in a directory written to the disk, where the file system can do that."""
    number = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(number)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.ENOSYS):
            raise
    finally:
        os.close(number)
