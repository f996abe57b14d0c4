"""Whether what is due runs now, where the ranks of all shards of a model must average before any of them computes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs

if TYPE_CHECKING:
    from collections.abc import Callable


@attrs.frozen
class Together:
    """Asks the ranks that keep a replica's other shards; of a model that is not sharded each rank decides by itself.

    Attributes:
        is_sharded: whether the model's own forward gathers its parameters from them.
    """

    _everywhere: Callable[[bool], bool | None] | None

    @property
    def is_sharded(self) -> bool:
        return self._everywhere is not None

    def may_run(self, holds: bool, *, begins: bool) -> bool:
        """Whether an average runs in a place that all of these ranks come to.

        Args:
            holds: whether this rank's parameters are in place.
            begins: whether this is a place to begin one; else it runs only where some rank has it behind it.

        Raises:
            LookupError: if some rank has averaged, and this one's parameters are not in place.
        """
        if self._everywhere is None:
            return holds and begins
        everywhere = self._everywhere(holds)
        if everywhere is None and not holds:
            raise LookupError("the parameters were moved before an average that other shards have had.")
        return everywhere is None or (everywhere and begins)

    def holds(self, holds: bool) -> bool:
        """Whether something holds on all of them, which all ask for."""
        return holds if self._everywhere is None else bool(self._everywhere(holds))
