"""Whether what an averager remembers of the parameters is to be taken anew: at first, and after weights were loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from commhub._errors import HookError, described

from ._snapshot import bits

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from commhub.protocol._hook import Averager


class Beginning:
    """Weights that are loaded begin training anew, unless those before are put back: averaged ones, for an evaluation.

    Args:
        averager: what remembers them.
        parameters: what is averaged, as it is now, by name.
        tell: lets the peers know that this rank's averager has failed.
    """

    def __init__(
        self,
        averager: Averager,
        parameters: Callable[[], Sequence[tuple[str, Tensor]]],
        tell: Callable[[str], None],
    ) -> None:
        self._averager, self._parameters, self._tell = averager, parameters, tell
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

    def renew(self) -> None:
        """Have the averager remember the parameters as they are, if training begins with them.

        Raises:
            HookError: if it cannot.
        """
        begin = getattr(self._averager, "begin", None)
        if begin is None or not self._is_now():
            return
        try:
            with torch.no_grad():
                begin({name: parameter.detach() for name, parameter in self._parameters()})
        except Exception as error:
            told = f"{type(self._averager).__name__}: its begin raised {described(error)}"
            self._tell(told)  # they may wait for it in an average
            raise HookError(told) from error

    def _is_now(self) -> bool:
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
