"""Writing a package from its templates: all of it or nothing.

A file whose name ends in ``-tpl`` is a ``string.Template`` and loses that ending; any other is copied. A folder called
``package`` gets the package's name.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Final

from commhub._errors import CommhubError
from commhub.registry._index import GROUPS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from commhub.registry._index import Kind

    from ._names import Names

__all__ = ["write"]

_HERE: Final = Path(__file__).parent
_MARK: Final = "-tpl"
_GROUPS: Final = {kind: group for group, kind in GROUPS.items()}
_TITLES: Final[dict[Kind, str]] = {
    "hook": "Clip outliers of each rank's gradients, then average them.",
    "averager": "Train on each rank alone and average the parameters every few steps.",
}


def write(names: Names, kind: Kind, directory: Path, author: str) -> tuple[Path, list[Path]]:
    """Write the folder ``directory/commhub-<name>``; return it and the files in it, relative to it, sorted.

    Raises:
        ValueError: if ``author`` holds no name or more than one line.
        CommhubError: if something of that name exists, or the folder cannot be written.
    """
    fields = _fields(names, kind, author)
    target = directory / names.distribution
    try:
        if target.exists() or target.is_symlink():
            raise CommhubError(f"{target} exists already: nothing was written.")
        with tempfile.TemporaryDirectory(prefix=f".{names.distribution}-", dir=directory) as scratch:
            draft = Path(scratch) / names.distribution  # a folder of its own: mkdtemp's is closed to others
            for path, content in _files(names.package, kind, fields):
                (draft / path).parent.mkdir(parents=True, exist_ok=True)
                (draft / path).write_bytes(content)
            draft.rename(target)
    except OSError as err:
        raise CommhubError(f"{target} cannot be written: {err.strerror or err}.") from err
    return target, sorted(path.relative_to(target) for path in target.rglob("*") if path.is_file())


def _files(package: str, kind: Kind, fields: dict[str, str]) -> Iterator[tuple[Path, bytes]]:
    """Every file's path in the new folder, and its content."""
    for root in (_HERE / "template_common", _HERE / f"template_{kind}"):
        for source in sorted(path for path in root.rglob("*") if path.is_file()):
            parts = [package if part == "package" else part for part in source.relative_to(root).parts]
            content = source.read_bytes()
            if source.name.endswith(_MARK):
                parts[-1] = parts[-1].removesuffix(_MARK)
                content = Template(content.decode()).substitute(fields).encode()
            yield Path(*parts), content


def _fields(names: Names, kind: Kind, author: str) -> dict[str, str]:
    authors = [name.strip() for name in author.split(",") if name.strip()]
    if not authors or not author.isprintable():
        raise ValueError(f"the author is {author!r}: give a name, or several with commas between, in one line.")
    return {
        "hook": names.hook,
        "distribution": names.distribution,
        "package": names.package,
        "class_name": names.class_name,
        "kind": kind,
        "group": _GROUPS[kind],
        "title": _TITLES[kind],
        # A JSON string of printable characters is a TOML string too.
        "authors": ", ".join(f"{{ name = {json.dumps(name, ensure_ascii=False)} }}" for name in authors),
        "owner": ", ".join(authors),
    }
