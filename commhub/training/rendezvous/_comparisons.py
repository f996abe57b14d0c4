"""What a hook has the ranks compare when it is prepared, besides its options and the model."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from commhub._errors import HookMismatchError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


class Comparisons:
    """What ``Setup.agree`` was given during one preparation."""

    def __init__(self) -> None:
        self._asked: list[tuple[str, Callable[[], str], str]] = []

    def add(self, what: str, value: Callable[[], str], here: str) -> None:
        """Compare one more thing."""
        self._asked.append((what, value, here))

    def facts(self) -> dict[str, list[str]]:
        """The values, by what they are: several where several hooks ask the same."""
        found: dict[str, list[str]] = {}
        for what, value, _ in self._asked:
            found.setdefault(what, []).append(value())
        return found

    @contextlib.contextmanager
    def told(self) -> Iterator[None]:
        """Say with a HookMismatchError raised inside what this rank's circumstances are."""
        try:
            yield
        except HookMismatchError as error:
            text = str(error).removesuffix(" Register the same hook with the same options and model everywhere.")
            here = " ".join(
                f"Of this rank: {here}, or pass verify=False." for what, _, here in self._asked if what in text
            )
            raise HookMismatchError(f"{text} {here}".rstrip()) from None
