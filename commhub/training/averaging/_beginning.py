"""Whether what an averager remembers of the parameters is to be taken anew: at first, and after weights were loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ._snapshot import bits

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor


class Beginning:
    """Weights that are loaded begin training anew, unless those before are put back: averaged ones, for an evaluation.

    Args:
        parameters: what is averaged, as it is now, by name.
    """

    def __init__(self, parameters: Callable[[], Sequence[tuple[str, Tensor]]]) -> None:
        self._parameters = parameters
        self._is_fresh, self._has_begun, self._is_restored = True, False, False
        self._before: list[Tensor] | None = None

    def loading(self, *_: object) -> None:
        """Weights are about to be loaded."""
        if self._before is None:
            self._before = self._bits()

    def loaded(self, *_: object) -> None:
        """Weights were loaded."""
        self._is_fresh = not self._is_restored

    def restore(self) -> None:
        """The averager's memory was loaded: until the next step it counts, whichever weights are."""
        self._is_fresh, self._has_begun, self._is_restored = False, True, True

    def is_now(self) -> bool:
        """Whether training begins with the parameters as they are."""
        if not self._is_fresh or not self._has_begun or self._before is None:
            return self._is_fresh
        now = self._bits()
        return len(now) != len(self._before) or not all(map(torch.equal, now, self._before))

    def step_ended(self) -> None:
        """A step has ended: what was loaded before it has been taken."""
        self._is_fresh, self._has_begun, self._is_restored, self._before = False, True, False, None

    def _bits(self) -> list[Tensor]:
        return bits([parameter for _, parameter in self._parameters()])
