"""The four questions that every cell is asked."""

from __future__ import annotations

import re
import signal
from typing import TYPE_CHECKING

from ._faults import FAULTS, TIMEOUT, Fault

if TYPE_CHECKING:
    from collections.abc import Sequence

    from commhub.testing import RankResult

    from ._story import Story

WITHIN = TIMEOUT + 5.0
"""Seconds within which every rank ends."""
CLOSE = 1e-6


def ask(fault: str, victim: int, results: Sequence[RankResult], *, error: bool) -> None:
    """Assert that the cell went well; ``error``: whether somebody has to be told."""
    what = FAULTS[fault]
    killed = {victim} if what.kills else set()
    assert all(results[rank].exitcode == -signal.SIGKILL for rank in killed), "the victim was not killed"
    for rank, result in enumerate(results):
        if rank not in killed:
            assert result.error is None, f"rank {rank}: {result.error}\n{result.stderr}"
            assert result.exitcode == 0, f"rank {rank} ended with {result.exitcode}:\n{result.stderr}"
    stories = {rank: result.value for rank, result in enumerate(results) if rank not in killed}
    for rank, story in stories.items():
        if error:
            ended_in_time(rank, story, what, victim)
            names_rank_and_cause(rank, story, what, victim)
        else:
            assert story.error is None, f"rank {rank}: nothing was to be told, but {story.error}"
    if not error and fault != "link: corrupt":  # nobody can tell, and what follows is made of it
        assert_right([story.there for story in stories.values()])
    training_goes_on(stories)
    nothing_is_left(stories)


def ended_in_time(rank: int, story: Story, fault: Fault, victim: int) -> None:
    """1. Every rank ends in time, in an error of commhub's; who ends its own process with SystemExit is free to."""
    assert story.error is not None, f"rank {rank} was told nothing"
    own = rank == victim and story.error.kind == "SystemExit"
    assert story.error.is_commhubs or own, f"rank {rank}: {story.error} is none of commhub's"
    assert story.error.seconds < WITHIN, f"rank {rank} took {story.error.seconds:.1f} s: {story.error}"


def names_rank_and_cause(rank: int, story: Story, fault: Fault, victim: int) -> None:
    """2. The error names the rank that failed, and says how."""
    text = story.error.text
    assert re.search(fault.words, text), f"rank {rank}: {text!r} does not say {fault.words!r}"
    if fault.ends_the_store:
        return  # no rank is to blame
    # Each says of whom it heard it, the first cause last; what happened "on rank 0" is no rank's fault.
    blamed = [int(number) for number in re.findall(r"(?<!on )ranks? (\d+)", text)]
    if fault.symmetric:
        assert rank == victim or victim in blamed, f"rank {rank}: {text!r} does not name rank {victim}"
    elif rank != victim or blamed:
        assert blamed[-1:] == [victim], f"rank {rank}: {text!r} does not blame rank {victim}"


def training_goes_on(stories: dict[int, Story]) -> None:
    """3. After a swap, or another registration, all have the mean of all gradients, bit by bit the same."""
    for rank, story in stories.items():
        assert isinstance(story.afterwards, list), f"rank {rank} could not go on: {story.afterwards}"
    for step in zip(*(story.afterwards for story in stories.values()), strict=True):
        assert_right(step)


def assert_right(several: Sequence[object]) -> None:
    """The same on all ranks, and what it should be."""
    assert all(one.error < CLOSE for one in several), several
    assert len({one.digest for one in several}) == 1, several


def nothing_is_left(stories: dict[int, Story]) -> None:
    """4. There are no more descriptors and threads than before."""
    for rank, story in stories.items():
        more = [after - before for before, after in zip(story.before, story.after, strict=True)]
        assert max(more) <= 0, f"rank {rank}: {more[0]} descriptors more than before, {more[1]} threads more"


def ended_cleanly(fault: str, victim: int, results: Sequence[RankResult], now: float) -> None:
    """What is asked of processes that end while a step is under way: that they do, in time, and say nothing bad."""
    for rank, result in enumerate(results):
        if not (FAULTS[fault].kills and rank == victim):
            assert result.exitcode == 0, f"rank {rank} ended with {result.exitcode}:\n{result.stderr}"
            assert not re.search("Fatal|terminate called", result.stderr), result.stderr
    left = [result.value.left for result in results if result.value is not None]
    assert now - max(left) < WITHIN, f"the processes took {now - max(left):.1f} s to end"
