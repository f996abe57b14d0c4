"""The word of a rank that has given up because the store did not answer, for who holds the store and was stopped.

While the store is silent no word can be left there; but questions are on their way to it. When it answers one of them
at last, this rank's background says that nobody waits for the answer any more.
"""

from __future__ import annotations

import contextlib
import json
import threading
from typing import TYPE_CHECKING

from torch.distributed.distributed_c10d import PrefixStore, Store

from commhub._errors import RegistrationError
from commhub.drivers._store import holder, is_held_here, own_connection, peek, told_lost, within

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch.distributed.distributed_c10d import ProcessGroup


def counter(size: int) -> str:
    """The name of the counter from which who comes draws a number."""
    return f"arrivals of {size}"


def connect(given: Store, rank: int, size: int, seconds: float) -> Store:
    """A connection of our own to commhub's part of a store.

    Raises:
        TimeoutError: if there is none in so many seconds.
        RuntimeError: if the store is gone.
    """
    late = threading.Event()

    def come() -> Store:
        base = PrefixStore("commhub", own_connection(given, seconds))
        if late.is_set():
            say(base, rank, int(base.add(counter(size), 0)) // size, seconds)
        return base

    try:
        return within(seconds, come)
    except TimeoutError:
        late.set()
        raise


def connected(group: ProcessGroup, given: Callable[[], Store], rank: int, size: int, timeout: float) -> Store:
    """A connection of our own to commhub's part of the store that ``given()`` returns.

    Raises:
        RegistrationError: if there is no store, it is gone, or does not answer.
    """
    try:
        store = given()
        try:
            return connect(store, rank, size, timeout)
        except (RuntimeError, TimeoutError) as error:
            raise RegistrationError(f"{told_lost(store, size, error)}: {error}") from error
    except (KeyError, ValueError, AttributeError) as error:
        text = f"process group {group.group_name!r} has no working store to agree on a hook through: {error}"
        raise RegistrationError(text) from error


def say(base: Store, rank: int, number: int, seconds: float) -> None:
    """Say that this rank has given up the rendezvous of that number after so many seconds."""
    with contextlib.suppress(RuntimeError):
        base.set(f"gave up {rank}", json.dumps([number, seconds]))


def told(base: Store, rank: int, size: int, number: int, missing: Sequence[int]) -> str:
    """Which of the ranks that do not come had given up the rendezvous of that number, as a sentence; empty if none."""
    words = {other: json.loads(peek(base, f"gave up {other}") or b"[-1, 0]") for other in missing}
    gave_up = [other for other, (which, _) in words.items() if which == number]
    if not gave_up:
        return ""
    names = f"rank{'s' if len(gave_up) > 1 else ''} {', '.join(map(str, gave_up))}"
    seconds = max(words[other][1] for other in gave_up)
    who = holder(base, size)
    since = f" Before, {names} had come and given up, since the store did not answer for {seconds:g} s"
    if is_held_here(base):
        return f"{since}: this rank, rank {rank}, holds the store, and was stopped or did not run."
    return f"{since}{f': {who} holds it, and was stopped or did not run' if who else ''}."
