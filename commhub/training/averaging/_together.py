"""Whether what is due runs now, where the ranks of all shards of a model must average before any of them computes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import attrs

from commhub._errors import HookError

if TYPE_CHECKING:

    class Meet(Protocol):
        """Hears from the ranks of all shards whether any of them begins, and whether something holds on all."""

        def __call__(self, *, begins: bool, holds: bool) -> tuple[bool, bool]: ...


@attrs.frozen
class Together:
    """Asks the ranks that keep a replica's other shards; of a model that is not sharded each rank decides by itself.

    Every rank asks before each average, so that none averages alone while the others compute, which takes it too.
    """

    _meet: Meet | None

    @property
    def is_sharded(self) -> bool:
        """Whether there are other shards, which the model's own forward gathers."""
        return self._meet is not None

    def may_run(self, holds: bool, *, begins: bool) -> bool:
        """Whether an average that is due runs here, where a rank whose step was skipped comes to.

        Args:
            holds: whether this rank's parameters are in place.
            begins: whether this is a place to begin an average; else it runs only if other ranks are about to.

        Raises:
            HookError: where they are, and the parameters of some rank are not in place; on all of them.
        """
        if self._meet is None:
            return holds and begins
        any_begins, all_hold = self._meet(begins=False, holds=holds)
        if any_begins and not all_hold:
            raise HookError(_MOVED)
        return any_begins or (begins and all_hold)

    def begin(self) -> None:
        """This rank is about to average, and so are they all.

        Raises:
            HookError: as ``may_run``.
        """
        if self._meet is not None and not self._meet(begins=True, holds=True)[1]:
            raise HookError(_MOVED)

    def holds(self, holds: bool) -> bool:
        """Whether something holds on all of them, which all ask for."""
        return holds if self._meet is None else self._meet(begins=False, holds=holds)[1]


_MOVED = (
    "an average is due on the ranks of all shards, some of which have taken the optimizer's step, and on another the "
    "parameters were moved since the backward before and no optimizer has stepped."
)
