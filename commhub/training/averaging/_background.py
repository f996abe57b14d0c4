"""An average on a rank that must not wait for it where it begins."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


class Background:
    """Runs one function at a time in a thread of its own."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    def start(self, function: Callable[[], BaseException | None]) -> None:
        """Have the function run, which returns what went wrong; after ``join``."""

        def run() -> None:
            self._failure = function()

        self._thread = threading.Thread(target=run, name="commhub-average", daemon=True)
        self._thread.start()

    def join(self) -> None:
        """Wait for what runs.

        Raises:
            HookError: what went wrong there.
        """
        thread, self._thread = self._thread, None
        if thread is not None:
            thread.join()
            failure, self._failure = self._failure, None
            if failure is not None:
                raise failure
