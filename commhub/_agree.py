"""Agreement among the ranks of a group before anything communicates: the same hook, options and model everywhere.

It runs over the group's store, so it needs no working communicator, interferes with none, and can say which rank did
not come. Every rank takes part with what it has, a failure of its own included; then all go on or all raise.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import time
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import attrs
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, ProcessGroup, Store

from ._errors import HookMismatchError, RegistrationError
from .drivers._board import own_connection
from .drivers._errand import within

if TYPE_CHECKING:
    from collections.abc import Mapping


@attrs.frozen
class Meeting:
    """A place in the group's store that only this occasion uses, the same on every rank."""

    store: Store
    rank: int
    size: int
    timeout: float

    @classmethod
    def of(cls, group: ProcessGroup, timeout: float) -> Meeting:
        """The group's next meeting. Registration is collective, so every rank counts alike.

        Raises:
            RegistrationError: if the group has no store.
        """
        rank = dist.get_rank(group)
        try:
            given = dist.distributed_c10d._get_process_group_store(group)
            base = within(timeout, lambda: own_connection(given, timeout))
            number = within(timeout, lambda: base.add(f"commhub/meetings of rank {rank}", 1))
        except (KeyError, ValueError, AttributeError, RuntimeError, TimeoutError) as error:
            text = f"process group {group.group_name!r} has no working store to agree on a hook through: {error}"
            raise RegistrationError(text) from error
        return cls(PrefixStore(f"commhub/{number}", base), rank, dist.get_world_size(group), timeout)

    def branch(self, name: str) -> Store:
        """A part of the store for something made at this meeting."""
        return PrefixStore(name, self.store)


def agree(
    meeting: Meeting,
    topic: str,
    facts: Mapping[str, Any],
    failure: BaseException | None,
    *,
    verify: bool = True,
) -> tuple[str, ...]:
    """Meet the other ranks; return every rank's host.

    Args:
        meeting: where.
        topic: which of the meeting's rounds this is.
        facts: what must be the same everywhere, JSON-able. Ranks exchange a digest; the facts only where it differs.
        failure: why this rank cannot go on, if it cannot.
        verify: whether facts that differ are an error; one rank that says so is enough.

    Raises:
        HookMismatchError: on every rank, naming ranks and values, when facts differ.
        RegistrationError: where nothing failed, naming a rank where something did, or ranks that did not come.
        BaseException: ``failure`` itself, on its rank.
    """
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    why = "" if failure is None else f"{type(failure).__name__}: {failure}"
    mine = json.dumps([digest, _host(), why, verify])
    summary = json.loads(_gathered(meeting, topic, mine))
    if isinstance(summary, str):
        raise failure or RegistrationError(summary)
    if failure is not None:
        raise failure
    for rank, (_, _, text, _) in enumerate(summary):
        if text:
            raise RegistrationError(f"rank {rank} could not go on: {text}")
    if any(verify for *_, verify in summary) and len({digest for digest, *_ in summary}) > 1:
        everyone = json.loads(_gathered(meeting, f"{topic}/facts", json.dumps(facts)))
        raise HookMismatchError(_difference(everyone))
    return tuple(host for _, host, *_ in summary)


def _gathered(meeting: Meeting, topic: str, mine: str) -> str:
    """The list of what every rank brought, as JSON; or, as a JSON string, why there is none."""
    longest = 2 * meeting.timeout + 5.0  # what is waited for within ends before
    try:
        return within(longest, lambda: _brought(meeting, topic, mine))
    except TimeoutError as error:
        text = (
            f"the process group's store does not answer ({error}); the machine that holds it is gone, or the network."
        )
        raise RegistrationError(text) from error


def _brought(meeting: Meeting, topic: str, mine: str) -> str:
    store = meeting.branch(topic)
    if meeting.rank > 0:
        store.set(str(meeting.rank), mine)
        try:
            store.wait(["all"], timedelta(seconds=meeting.timeout + min(10.0, meeting.timeout)))
        except RuntimeError as error:
            text = f"rank 0 did not come within {meeting.timeout:g} s; register, swap and remove are collective."
            raise RegistrationError(text) from error
        return store.get("all").decode()
    brought = [mine]
    missing = []
    deadline = time.monotonic() + meeting.timeout
    for rank in range(1, meeting.size):
        left = max(0.01, deadline - time.monotonic())
        try:
            store.wait([str(rank)], timedelta(seconds=left))
            brought.append(store.get(str(rank)).decode())
        except RuntimeError:
            missing.append(rank)
    summary = f"[{', '.join(brought)}]"
    if missing:
        names = ", ".join(map(str, missing))
        told = f"rank {names} did not come within {meeting.timeout:g} s; register, swap and remove are collective."
        summary = json.dumps(told)
    store.set("all", summary)
    return summary


def _difference(everyone: list[dict[str, Any]]) -> str:
    lines = []
    for key in sorted({key for facts in everyone for key in facts}):
        values: dict[str, list[int]] = {}
        for rank, facts in enumerate(everyone):
            values.setdefault(json.dumps(facts.get(key)), []).append(rank)
        if len(values) > 1:
            told = (f"{_ranks(ranks)}: {_short(value, list(values))}" for value, ranks in values.items())
            lines.append(f"{key} ({'; '.join(told)})")
    return f"ranks disagree on {', '.join(lines)}. Register the same hook with the same options and model everywhere."


def _ranks(ranks: list[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


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
