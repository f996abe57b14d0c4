"""What a collective takes on a network of two levels: between the ranks of a host, and between hosts.

The algorithms are those that carry commhub's collectives out over Gloo: rings for an all-reduce and an all-gather, of
which one message in each round leaves a host that holds neighbouring ranks; everybody to everybody for an all-to-all,
and for a reduce-scatter, which is one with a sum; a tree for a broadcast.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import attrs

from commhub.protocol._collectives import AllGather, AllReduce, AllToAll, Broadcast, ReduceScatter

from ._replay import Flight

if TYPE_CHECKING:
    from commhub.protocol._collectives import Collective

    from ._alone import Asked


@attrs.frozen(kw_only=True)
class Level:
    """The links of one level.

    Attributes:
        bits_per_second: that one rank sends to another on the same host, or one host to all others.
        latency: seconds of one message of no size.
        load: the share of a core that is busy while a link of it is.
    """

    bits_per_second: float
    latency: float
    load: float = 0.0

    def seconds(self, sent_bytes: float) -> float:
        """For how long so many bytes keep a link busy."""
        return 8 * sent_bytes / self.bits_per_second


@attrs.frozen(kw_only=True)
class Fabric:
    """A network.

    Attributes:
        within: between the ranks of a host.
        between: between hosts.
        hosts: per rank, the number of its host.
    """

    within: Level
    between: Level
    hosts: tuple[int, ...]

    def flight(self, asked: Asked) -> Flight:
        """What a collective takes, if all ranks ask for one like it at the same time, each in its group."""
        ranks = tuple(range(len(self.hosts))) if asked.ranks is None else asked.ranks
        p = len(ranks)
        if p == 1 or not asked.payload_bytes:
            return Flight(latency=0.0, occupied=0.0)
        members = [self.hosts[rank] for rank in ranks]
        rounds = _rounds(asked.kind, p)
        if len(set(members)) == 1:
            level, occupied = self.within, self.within.seconds(asked.sent_bytes)
        else:
            own = members.count(members[0])
            # Where a group has few of a host's ranks, the others are in groups of their own, over the same link.
            groups = max(1, self.hosts.count(members[0]) // own)
            leaving = groups * _leaving(asked, p, own)
            level = self.between
            occupied = max(self.between.seconds(leaving), self.within.seconds(asked.sent_bytes) if own > 1 else 0.0)
        return Flight(latency=rounds * level.latency, occupied=occupied, load=level.load)

    def word(self) -> float:
        """Seconds in which all ranks hear from each other that a step ended well: an all-reduce of one number."""
        p = len(self.hosts)
        level = self.within if len(set(self.hosts)) == 1 else self.between
        return _rounds(AllReduce, p) * level.latency if p > 1 else 0.0


def _rounds(kind: type[Collective], p: int) -> int:
    """How many messages have to wait for one another."""
    counts = {AllReduce: 2 * (p - 1), AllGather: p - 1, AllToAll: 1, ReduceScatter: 1}
    return counts[kind] if kind in counts else math.ceil(math.log2(p))


def _leaving(asked: Asked, p: int, own: int) -> float:
    """The bytes that leave a host with so many of the group's ranks."""
    if asked.kind in (AllToAll, ReduceScatter):
        return own * asked.payload_bytes * (p - own) / p
    if asked.kind is Broadcast:
        return float(asked.payload_bytes)
    return asked.sent_bytes


def dealt_out(ranks: int, per_host: int) -> tuple[int, ...]:
    """The hosts of ranks that are dealt out in their order, the last host perhaps with fewer."""
    return tuple(rank // per_host for rank in range(ranks))
