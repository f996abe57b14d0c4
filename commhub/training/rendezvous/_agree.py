"""Agreement among the ranks of a group before anything communicates: the same hook, options and model everywhere.

It runs over the group's store, so it needs no working communicator, interferes with none, and can say which rank did
not come. Every rank takes part with what it has, a failure of its own included; then all go on or all raise.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
from typing import TYPE_CHECKING, Any

import attrs

from commhub._errors import HookMismatchError, RegistrationError, described
from commhub.drivers._meeting import Unmet

from ._rendezvous import Rendezvous

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ._verdict import Verdict

__all__ = ["Rendezvous", "agree", "number_hosts"]

_INTERRUPTED = 1.0
"""Seconds that an interrupted rank waits for its peers."""
_IN_VAIN = 0.5
"""Seconds that a rank waits for all that has waited for one in vain: the others have too by then, or have come."""
_STILL_CONNECTING = 2.0
"""Seconds more that a rank waits for those who are waiting for another, up to the timeout, before they come."""


@attrs.frozen
class _Word:
    """What a rank says of itself: the call it makes, a digest of its facts, why it cannot go on if it cannot.

    ``hearsay``: whether that is another rank's doing.
    """

    call: str
    digest: str
    host: str
    failure: str
    verify: bool
    hearsay: bool = False


def agree(
    rendezvous: Rendezvous,
    topic: str,
    facts: Mapping[str, Any],
    failure: BaseException | None,
    *,
    verify: bool = True,
    more: bool = False,
    connecting: bool = False,
) -> tuple[str, ...]:
    """Meet the other ranks; return every rank's host.

    Args:
        rendezvous: where.
        topic: the call that this is part of, as the user knows it: ``"swap"``. Ranks that call different things are
            told so.
        facts: what must be the same everywhere, JSON-able. Ranks exchange a digest; the facts only where it differs.
        failure: why this rank cannot go on, if it cannot.
        verify: whether facts that differ are an error; one rank that says so is enough.
        more: whether this rendezvous has another round if all goes well.
        connecting: whether others may be waiting for ranks to make groups with, who come when they have given up.

    Raises:
        HookMismatchError: on every rank, naming ranks and values, when facts differ.
        RegistrationError: where nothing failed, naming a rank where something did, ranks that did not come, or what
            the ranks called.
        BaseException: ``failure`` itself, on its rank.
    """
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    why, hearsay = "" if failure is None else described(failure), isinstance(failure, Unmet)
    mine = json.dumps([topic, digest, _host(), str(failure) if hearsay else why, verify, hearsay])
    patience = rendezvous.timeout + (_STILL_CONNECTING if connecting else 0.0)
    if isinstance(failure, KeyboardInterrupt | Unmet):
        patience = min(_IN_VAIN if hearsay else _INTERRUPTED, rendezvous.timeout)

    def goes_on(verdict: Verdict) -> bool:
        words = _words(verdict)
        return not _trouble(rendezvous, topic, verdict, words) and (more or _differ(words))

    rendezvous.topic = topic
    try:
        verdict = rendezvous.round(mine, patience, goes_on)
        words = _words(verdict)
        if told := _trouble(rendezvous, topic, verdict, words):
            raise RegistrationError(told)
        if _differ(words):
            everyone = rendezvous.round(json.dumps(facts), rendezvous.timeout, lambda _: False)
            if told := _absent(rendezvous, topic, everyone):
                raise RegistrationError(told)
            raise HookMismatchError(
                _difference(rendezvous, [json.loads(everyone.brought[rank]) for rank in range(rendezvous.size)])
            )
    except (RegistrationError, HookMismatchError) as error:
        if failure is None:
            raise
        if hearsay:
            raise error from failure
        if not _says(failure, why, str(error)):
            failure.add_note(str(error))
        raise failure from failure.__cause__
    return tuple(words[rank].host for rank in range(rendezvous.size))


def _says(failure: BaseException, why: str, told: str) -> bool:
    """Whether what all ranks are told is this failure, or is in it or its notes already."""
    return told.endswith(why) or why.endswith(told) or told in getattr(failure, "__notes__", ())


def _words(verdict: Verdict) -> dict[int, _Word]:
    return {rank: _Word(*json.loads(text)) for rank, text in sorted(verdict.brought.items())}


def _trouble(rendezvous: Rendezvous, topic: str, verdict: Verdict, words: Mapping[int, _Word]) -> str:
    """Why nobody goes on, if so: a failure on a rank first, because the others' absence may follow from it."""
    failed = {rank: word for rank, word in words.items() if word.failure}
    told = [
        f"rank {rendezvous.called(rank)} could not go on: {word.failure}"
        for rank, word in failed.items()
        if not word.hearsay
    ][:1]
    told = told or [f"{word.failure}{_before(rendezvous)}" for word in failed.values()][:1]
    if not told and (absent := _absent(rendezvous, topic, verdict)):
        told.append(absent)
    calls: dict[str, list[int]] = {}
    for rank, word in words.items():
        calls.setdefault(word.call, []).append(rank)
    if len(calls) > 1:
        several = "; ".join(f"{_ranks(rendezvous, ranks)}: {call}" for call, ranks in calls.items())
        told.append(f"the ranks called different things ({several}); each of them is to be called on all ranks.")
    return " And ".join(told)


def _absent(rendezvous: Rendezvous, topic: str, verdict: Verdict) -> str:
    if verdict.left is not None:
        return f"rank {rendezvous.called(verdict.left)} was interrupted while it waited for the others."
    missing = [rank for rank in range(rendezvous.size) if rank not in verdict.brought]
    if not missing:
        return ""
    if rendezvous.rank in missing:
        return f"this rank came to {topic} when the others had waited {verdict.waited:g} s and given up."
    told = f"{_ranks(rendezvous, missing)} did not come to {topic} within {verdict.waited:g} s"
    return f"{told}; it is to be called on all ranks.{_before(rendezvous)}"


def _before(rendezvous: Rendezvous) -> str:
    """Who had come before and gone, if this rank was late, or its store silent."""
    if rendezvous.missed is None:
        return rendezvous.unanswered
    words = _words(rendezvous.missed)
    calls = " and ".join(dict.fromkeys(word.call for word in words.values()))
    return (
        f" Before, {_ranks(rendezvous, list(words))} had come to {calls}, waited {rendezvous.missed.waited:g} s and "
        f"given up: this rank, rank {rendezvous.called(rendezvous.rank)}, was late."
    )


def _differ(words: Mapping[int, _Word]) -> bool:
    return any(word.verify for word in words.values()) and len({word.digest for word in words.values()}) > 1


def _difference(rendezvous: Rendezvous, everyone: list[dict[str, Any]]) -> str:
    lines = []
    for key in sorted({key for facts in everyone for key in facts}):
        values: dict[str, list[int]] = {}
        for rank, facts in enumerate(everyone):
            values.setdefault(json.dumps(facts.get(key)), []).append(rank)
        if len(values) > 1:
            told = (f"{_ranks(rendezvous, ranks)}: {_short(value, list(values))}" for value, ranks in values.items())
            lines.append(f"{key} ({'; '.join(told)})")
    return f"ranks disagree on {', '.join(lines)}. Register the same hook with the same options and model everywhere."


def _ranks(rendezvous: Rendezvous, ranks: list[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(str(rendezvous.called(rank)) for rank in ranks)}"


def _short(value: str, every: list[str]) -> str:
    """A value to show; of a long one the part in which it differs."""
    if len(value) <= 80:
        return value
    start = next((i for i in range(len(value)) if any(o[i : i + 1] != value[i : i + 1] for o in every)), 0)
    return f"...{value[max(0, start - 30) : start + 50]}..."


def _host() -> str:
    return os.environ.get("COMMHUB_HOST") or socket.gethostname()


def number_hosts(hosts: tuple[str, ...]) -> tuple[int, ...]:
    """Each rank's host as a number, counted from 0 in rank order."""
    order = {name: number for number, name in enumerate(dict.fromkeys(hosts))}
    return tuple(order[name] for name in hosts)
