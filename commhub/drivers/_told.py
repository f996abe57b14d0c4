"""How errors tell of ranks and of other errors: in few words, however many there are."""

from __future__ import annotations

from typing import TYPE_CHECKING

from commhub._errors import described

if TYPE_CHECKING:
    from collections.abc import Sequence

_SEVERAL = 6
"""So many ranks are told of one by one."""


def told_left(left: dict[int, str]) -> str | None:
    """What ranks said that take part no more, as one sentence; None where there are none."""
    return told_first([f"rank {rank} {text}" for rank, text in sorted(left.items())]) or None


def told_first(told: Sequence[str]) -> str:
    """The first of some sentences, and how many there are more: errors stay short however many ranks there are."""
    more = [f"and {len(told) - _SEVERAL} more"] if len(told) > _SEVERAL else []
    return "; ".join([*told[:_SEVERAL], *more])


def told_silent(silent: Sequence[int], *, closed: bool) -> str:
    """Who is gone, having said nothing in a roll call.

    Args:
        silent: the ranks.
        closed: whether a connection closed; if none was made, they may be stopped or stuck as well.
    """
    names = ", ".join(map(str, silent))
    which, are, have = ("rank", "is", "has") if len(silent) == 1 else ("ranks", "are", "have")
    how = "gone: a connection closed" if closed else "gone, stopped or stuck: they could not be connected"
    if len(silent) == 1:
        how = how.replace("they", "it")
    return f"{which} {names} {are} {how}, and {which} {names} {have} said nothing for 2 s"


def described_briefly(error: BaseException) -> str:
    """An error in one line of at most 300 characters."""
    text = " ".join(described(error).split())
    return text if len(text) <= 300 else f"{text[:300]}..."
