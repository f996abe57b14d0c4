"""What a new package is called: one word, checked, and all that follows from it."""

from __future__ import annotations

import keyword
import re
from typing import Final

import attrs

from commhub._errors import CommhubError
from commhub.registry import _documented, _index, _lookup
from commhub.registry._spec import RESERVED

__all__ = ["Names"]

_NAME: Final = re.compile(r"[a-z][a-z0-9]*(?:[-_][a-z0-9]+)*", re.ASCII)
_PREFIX: Final = re.compile(r"\Acommhub[-_]")
_TAKEN: Final = frozenset({*RESERVED, "commhub", "true", "false", "none"})
"""What means something else: arguments of ``register``, the core itself, and constants in hook strings."""


@attrs.frozen
class Names:
    """The names of a package that offers one hook or averager, all from the hook's own: ``my_hook``."""

    hook: str

    @classmethod
    def of(cls, text: str) -> Names:
        """Read ``my-hook``, ``my_hook`` or ``commhub-my-hook``.

        Raises:
            ValueError: if it is none of these, a keyword or reserved.
        """
        bare = _PREFIX.sub("", text)
        if not _NAME.fullmatch(bare):
            raise ValueError(
                f"{text!r} cannot be a name: write lowercase letters and digits, a letter first, with single dashes "
                "between words, such as 'my-hook'."
            )
        names = cls(bare.replace("-", "_"))
        if keyword.iskeyword(names.hook) or keyword.iskeyword(names.class_name):
            raise ValueError(f"{text!r} cannot be a name: {bare!r} is a Python keyword.")
        if names.hook in _TAKEN:
            raise ValueError(f"{text!r} cannot be a name: {bare!r} is a reserved word of commhub.")
        return names

    @property
    def distribution(self) -> str:
        """What is installed: ``commhub-my-hook``."""
        return f"commhub-{self.hook.replace('_', '-')}"

    @property
    def package(self) -> str:
        """What is imported: ``commhub_my_hook``."""
        return f"commhub_{self.hook}"

    @property
    def class_name(self) -> str:
        """The class: ``MyHook``."""
        return "".join(word.capitalize() for word in self.hook.split("_"))

    def check_free(self) -> None:
        """See that nobody has them yet.

        Raises:
            CommhubError: if the core documents them, or an installed distribution offers them; it says which.
        """
        owner = _documented.owner(self.hook)
        if self.distribution in {*_documented.HOOKS.values(), *_documented.AVERAGERS.values()}:
            owner = self.distribution
        if owner:
            raise CommhubError(f"the name {self.hook!r} belongs to {owner}, a documented plugin: choose another.")
        for claim in _index.claims():
            if self.distribution == claim.distribution or self.hook == _lookup.canonical(claim.name):
                raise CommhubError(
                    f"the name {self.hook!r} is taken: {claim.distribution} {claim.version} in {claim.location} offers "
                    f"the {claim.kind} {claim.name!r}. Choose another, or uninstall that first."
                )
