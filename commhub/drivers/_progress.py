"""Which collectives a rank has come to and waits for, and what follows of that where ranks keep each other waiting.

All members of a group come to its collectives in one order, so a number says which one is meant on each of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs

from ._told import told_first

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence

    from commhub.protocol._collectives import Subgroup

    from ._communicator import Flight
    from ._task import Task

Number = tuple[str, int]
"""A collective: its group, and how many that group came to until then."""

_SEVERAL = 6
"""So many stretches of ranks are listed, and not more."""


@attrs.define(eq=False)
class _Awaited:
    """Collectives of a task: in words, their numbers, their flights; these are ``None`` while they are held back."""

    words: str
    numbers: tuple[Number, ...]
    flights: Sequence[Flight] | None = None

    def is_over(self) -> bool:
        return self.flights is not None and all(flight.is_done() for flight in self.flights)


class Progress:
    """This rank's. One thread takes down, and any may ask.

    Attributes:
        last: what it came to last, in words; empty if it has come to nothing.
    """

    def __init__(self) -> None:
        self._reached: dict[str, int] = {}
        self._awaited: dict[Task, _Awaited] = {}
        self.last = ""

    def comes_to(self, task: Task) -> None:
        """Take down that the task is about to ask for its collectives."""
        numbers = []
        for job in task.jobs:
            key = _key(job.group)
            self._reached[key] = self._reached.get(key, 0) + 1
            numbers.append((key, self._reached[key]))
        self.last = _words(task)
        self._awaited[task] = _Awaited(self.last, tuple(numbers))

    def issued(self, task: Task, flights: Sequence[Flight]) -> None:
        """Take down that they are on their way."""
        self._awaited[task].flights = flights

    def has(self, task: Task) -> None:
        """Take down that the task goes on with their results."""
        self._awaited.pop(task, None)

    def forget(self) -> None:
        """Take down that nothing is waited for any more."""
        self._awaited.clear()

    def place(self) -> str:
        """What is waited for, in words; empty if nothing is."""
        return self._first().words

    def said(self, told: str, *, waits: bool) -> dict[str, Any]:
        """What to answer to peers who ask, for ``Doing.read``.

        Args:
            told: what this rank does, a predicate.
            waits: whether it does nothing but wait.
        """
        still = [number for one in tuple(self._awaited.values()) if not one.is_over() for number in one.numbers]
        first = self._first() if waits else _NOTHING
        return {"told": told, "at": first.words, "awaits": first.numbers, "open": still, "reached": self._reached}

    def _first(self) -> _Awaited:
        """What is held back, since that is waited for by itself; else what was issued first of what has not ended."""
        awaited = tuple(self._awaited.values())
        held = [one for one in awaited if one.flights is None]
        return next((one for one in (*held, *awaited) if not one.is_over()), _NOTHING)


_NOTHING = _Awaited("", ())


@attrs.frozen
class Doing:
    """What a rank answers.

    Attributes:
        told: what it does, a predicate.
        at: what it waits for, in words; empty if it does something else.
        awaits: that in numbers.
        open: all collectives that it has come to and that have not ended there.
        reached: how many it has come to, by group.
    """

    told: str
    at: str = ""
    awaits: frozenset[Number] = frozenset()
    open: frozenset[Number] = frozenset()
    reached: Mapping[str, int] = attrs.Factory(dict)

    @classmethod
    def read(cls, answer: Any) -> Doing:
        """What ``Progress.said`` made; words alone are a predicate."""
        if isinstance(answer, str):
            return cls(answer)
        awaits, still_open = (frozenset((key, number) for key, number in answer[name]) for name in ("awaits", "open"))
        return cls(answer["told"], answer["at"], awaits, still_open, answer["reached"])

    @property
    def waits(self) -> bool:
        """Whether it waits, if only for an answer."""
        return self.told.startswith("waits")

    def has_come_to(self, number: Number) -> bool:
        """Whether it has come to a collective."""
        return self.reached.get(number[0], 0) >= number[1]

    def has(self, number: Number) -> bool:
        """Whether a collective has ended there."""
        return self.has_come_to(number) and number not in self.open


def told_behind(asks: int, doing: Mapping[int, Doing]) -> str:
    """Who keeps a rank waiting in the end, and where that one is: a sentence without its end.

    A rank waits for those that have not come to its collective, and these for others perhaps: who waits for nobody is
    the first cause. A message that was lost shows by where it leaves its ranks, if it has ended for some of them.

    Args:
        asks: the rank that waits.
        doing: what each rank does, this one too.
    """
    seen: list[int] = []
    stuck: list[int] = []
    idle: list[int] = []
    if not doing[asks].awaits:  # it waits to hear whether its peers ask for as little as it does
        idle = [rank for rank, one in doing.items() if rank != asks and not one.awaits]
        return told_first([f"rank {rank} {doing[rank].told}" for rank in idle]) or "every rank answers, and waits too"
    found = [asks]
    while found:
        rank = found.pop()
        if rank in seen:
            continue
        seen.append(rank)
        missing = _missing(rank, doing)
        if not doing[rank].awaits:
            idle.append(rank)
        elif missing:
            found += missing
        else:
            stuck.append(rank)
    if idle:
        return told_first([f"rank {rank} {doing[rank].told}" for rank in sorted(idle)])
    if stuck:
        return _told_stuck(sorted(stuck), doing)
    told = told_first([f"rank {rank} for {doing[rank].at}" for rank in sorted(seen)])
    return f"the ranks wait for each other: {told}"


def _missing(rank: int, doing: Mapping[int, Doing]) -> list[int]:
    """Who has not come to what a rank waits for."""
    return [
        other
        for other, one in doing.items()
        if any(_is_member(other, number) and not one.has_come_to(number) for number in doing[rank].awaits)
    ]


def _told_stuck(stuck: list[int], doing: Mapping[int, Doing]) -> str:
    """What to say of ranks that wait for what all have come to."""
    first = doing[stuck[0]]
    others = [rank for rank in doing if any(_is_member(rank, number) for number in first.awaits)]
    ended = [rank for rank in others if all(doing[rank].has(number) for number in first.awaits)]
    if not ended:
        where = "all ranks" if len(others) == len(doing) else f"ranks {_listed(others)}"
        return f"{first.at} has begun on {where} and ended on none: a message between them is late or lost"
    same = [rank for rank in others if doing[rank].awaits == first.awaits]
    who, waits = (f"rank {same[0]} is", "it waits") if len(same) == 1 else (f"ranks {_listed(same)} are", "they wait")
    plural = "s" if len(ended) > 1 else ""
    told = f"{who} behind: {waits} for {first.at}, which has ended on rank{plural} {_listed(ended)}"
    places = sorted({doing[rank].at for rank in ended} - {""})
    if len(places) == 1:
        return f"{told}; there {places[0]} is awaited"
    return f"{told}; there {len(places)} others are awaited, such as {places[0]}" if places else told


def _listed(ranks: Iterable[int]) -> str:
    """Ranks in few words: neighbours as a stretch, and not more than some."""
    stretches: list[list[int]] = []
    for rank in sorted(ranks):
        if stretches and stretches[-1][1] == rank - 1:
            stretches[-1][1] = rank
        else:
            stretches.append([rank, rank])
    words = [str(first) if first == last else f"{first}-{last}" for first, last in stretches]
    return ", ".join(words[:_SEVERAL]) + (" and more" if len(words) > _SEVERAL else "")


def _key(group: Subgroup | None) -> str:
    return "" if group is None else f"{group.key}:{','.join(map(str, group.ranks))}"


def _is_member(rank: int, number: Number) -> bool:
    ranks: Collection[str] = number[0].partition(":")[2].split(",")
    return not number[0] or str(rank) in ranks


def _words(task: Task) -> str:
    """A task's collectives, for people: what, which, where."""
    kinds = ", ".join(job.kind.__name__ for job in task.jobs)
    topic = "step" if task.position is None else task.position.topic.partition(" among ")[0]
    if topic == "sum":  # a few numbers, such as whether all have come through a step
        return f"{kinds} of commhub's own in step {task.bucket.step}"
    where = f"step {task.bucket.step}" if topic == "step" else f"the {topic} of step {task.bucket.step}"
    return f"{kinds} {task.stage + 1} of bucket {task.bucket.index} in {where}"
