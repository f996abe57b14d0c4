"""Where a failing rank says so, for its peers to read while they wait for it."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING

from ._store import Errand, within

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store


class FailureBoard:
    """One message, the first that any rank posts, in the registration's store.

    The store may be gone, or say nothing more; neither is a second error, and nobody waits for it.
    """

    _KEY = "failed"
    _ANSWERS_WITHIN = 0.05  # seconds; it takes less than one of them in a thousand where the store is alive

    def __init__(self, store: Store, rank: int) -> None:
        self._store, self._rank = store, rank
        self._look: Errand[tuple[int, str] | None] | None = None

    def post(self, text: str) -> None:
        """Tell the peers why this rank stopped."""
        printable = text.encode("utf-8", "backslashreplace").decode()
        with contextlib.suppress(RuntimeError, ValueError, TimeoutError):
            within(2.0, lambda: self._store.compare_set(self._KEY, "", f"{self._rank}:{printable}"))

    def read(self) -> tuple[int, str] | None:
        """The first failing peer's rank and message, if one failed. Asks the store, so call it seldom."""
        self._look = self._look or Errand(self._read)
        if not self._look.wait(self._ANSWERS_WITHIN):
            return None  # a later call takes the answer
        look, self._look = self._look, None
        return look.result()

    def _read(self) -> tuple[int, str] | None:
        try:
            if not self._store.check([self._KEY]):
                return None
            rank, _, text = self._store.get(self._KEY).decode().partition(":")
        except (RuntimeError, ValueError):
            return None
        return None if int(rank) == self._rank else (int(rank), text)

    def read_soon(self, seconds: float) -> tuple[int, str] | None:
        """The same, looking again for a while: a peer's connection often ends before its message arrives."""
        end = time.monotonic() + seconds
        while True:
            found = self.read()
            if found or time.monotonic() > end:
                return found
            time.sleep(0.05)
