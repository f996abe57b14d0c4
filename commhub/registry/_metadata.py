"""One distribution's files as the index needs them: its entry points and the few lines of its metadata, each read once.

``importlib-metadata`` finds distributions and reads their files. It would parse the whole of ``METADATA`` anew, the
README in it included, for the name, the version and the requirements each; with thousands of plugins that is most of
the time that ``commhub list`` takes.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final

import attrs

from commhub._printable import shown

from ._hookstring import canonical_distribution

if TYPE_CHECKING:
    from collections.abc import Collection

    from importlib_metadata import IDistribution

__all__ = ["Metadata", "installed_name", "points"]

_FIELD: Final = re.compile(r"^(Name|Version|Requires-Dist)[ \t]*:(.*(?:\n[ \t].*)*)", re.IGNORECASE | re.MULTILINE)
_WORD: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9.!+_-]{0,199}", re.ASCII)
_FILES: Final = ("METADATA", "PKG-INFO", "")
"""Where metadata is: of a wheel, of an egg, and of an egg that is a file itself."""


def installed_name(found: Any) -> str:
    """The normalised name that a distribution is installed under, from its folder's name where it has one.

    No public attribute has it: ``name`` parses the whole of ``METADATA``, of every package that is installed.
    """
    return canonical_distribution(found._normalized_name)


def points(text: str, groups: Collection[str]) -> list[tuple[str, str, str]]:
    """Group, name and value of each entry point in these groups.

    Raises:
        ValueError: for a line that is none of section, comment and ``name = value``.
    """
    found, group = [], ""
    for line in map(str.strip, text.splitlines()):
        if line.startswith("[") and line.endswith("]"):
            group = line[1:-1]
        elif line and not line.startswith("#"):
            name, equals, value = line.partition("=")
            if not equals:
                raise ValueError(f"{line!r} is no entry point")
            if group in groups:
                found.append((group, name.strip(), value.strip()))
    return found


@attrs.frozen
class Metadata:
    """What a distribution says of itself.

    Attributes:
        name: normalised; ``None`` where it says none.
        version: as it is written; ``None`` where it says none.
        requires: its requirements, each as one line.
    """

    name: str | None
    version: str | None
    requires: tuple[str, ...]

    @classmethod
    def of(cls, found: IDistribution) -> Metadata:
        """Read it; where there is nothing to read, all is missing.

        Raises:
            ValueError: if it is not UTF-8.
        """
        text = next(filter(None, map(found.read_text, _FILES)), "")
        fields: dict[str, list[str]] = {"name": [], "version": [], "requires-dist": []}
        for key, value in _FIELD.findall(text.replace("\r\n", "\n").partition("\n\n")[0]):
            fields[key.lower()].append(" ".join(value.split()))
        name, version = (next(iter(fields[key]), None) or None for key in ("name", "version"))
        return cls(canonical_distribution(name) if name else None, version, tuple(fields["requires-dist"]))

    def damage(self) -> str | None:
        """Why no distribution can have such metadata; else ``None``. What passes can stand in any text."""
        for what, text in (("name", self.name), ("version", self.version)):
            if text is None:
                return f"its metadata gives no {what}"
            if not _WORD.fullmatch(text):
                return f"{shown(text)} is no {what} that a distribution can have"
        return None
