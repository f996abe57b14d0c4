"""What collectives take on two levels: bytes are counted by walking each algorithm's messages from rank to rank."""

import pytest

from commhub.advice._alone import Asked
from commhub.advice._fabric import Fabric, Level, dealt_out
from commhub.protocol._collectives import AllGather, AllReduce, AllToAll, Broadcast, ReduceScatter

PAYLOAD = 1200
FAST = Level(bits_per_second=8e9, latency=1e-6)
SLOW = Level(bits_per_second=8e3, latency=0.5, load=0.25)


def messages(kind, ranks):
    """Who sends how many bytes to whom."""
    p = len(ranks)
    around = [(ranks[i], ranks[(i + 1) % p]) for i in range(p)]
    if kind is AllReduce:
        return [(a, b, PAYLOAD / p) for a, b in around for _ in range(2 * (p - 1))]
    if kind is AllGather:
        return [(a, b, PAYLOAD) for a, b in around for _ in range(p - 1)]
    return [(a, b, PAYLOAD / p) for a in ranks for b in ranks if a != b]


def asked(kind, p, ranks=None):
    return Asked(kind=kind, payload_bytes=PAYLOAD, sent_bytes=kind.sent_bytes(PAYLOAD, p), ranks=ranks)


@pytest.mark.parametrize("kind", [AllReduce, AllGather, AllToAll, ReduceScatter])
@pytest.mark.parametrize(("ranks", "per_host"), [(2, 1), (4, 1), (4, 2), (6, 3), (8, 2)])
def test_a_link_between_hosts_is_busy_for_as_long_as_what_leaves_a_host_takes(kind, ranks, per_host):
    hosts = dealt_out(ranks, per_host)
    leaving = sum(size for a, b, size in messages(kind, range(ranks)) if hosts[a] == 0 != hosts[b])
    flight = Fabric(within=FAST, between=SLOW, hosts=hosts).flight(asked(kind, ranks))
    assert flight.occupied == pytest.approx(leaving / 1000)
    assert flight.load == 0.25


@pytest.mark.parametrize("kind", [AllReduce, AllToAll])
def test_groups_across_hosts_share_their_links(kind):
    """Ranks 0 and 2, and 1 and 3, on two hosts of two: a host sends for both groups."""
    hosts = dealt_out(4, 2)
    leaving = sum(
        size for group in ((0, 2), (1, 3)) for a, b, size in messages(kind, group) if hosts[a] == 0 != hosts[b]
    )
    flight = Fabric(within=FAST, between=SLOW, hosts=hosts).flight(asked(kind, 2, (0, 2)))
    assert flight.occupied == pytest.approx(leaving / 1000)


def test_a_group_within_a_host_never_leaves_it():
    fabric = Fabric(within=FAST, between=SLOW, hosts=dealt_out(4, 2))
    flight = fabric.flight(asked(AllReduce, 2, (2, 3)))
    assert flight.occupied == pytest.approx(PAYLOAD / 1e9)
    assert flight.latency == pytest.approx(2e-6)


@pytest.mark.parametrize(("kind", "rounds"), [(AllReduce, 6), (AllGather, 3), (AllToAll, 1), (Broadcast, 2)])
def test_latency_counts_for_each_message_that_waits_for_another(kind, rounds):
    fabric = Fabric(within=FAST, between=SLOW, hosts=dealt_out(4, 1))
    assert fabric.flight(asked(kind, 4)).latency == rounds * 0.5


def test_who_is_alone_or_has_nothing_to_send_waits_for_nothing():
    fabric = Fabric(within=FAST, between=SLOW, hosts=(0,))
    assert fabric.flight(asked(AllReduce, 1)).occupied == fabric.flight(asked(AllReduce, 1)).latency == 0.0
    empty = Asked(kind=AllReduce, payload_bytes=0, sent_bytes=0.0, ranks=None)
    assert Fabric(within=FAST, between=SLOW, hosts=(0, 1)).flight(empty).latency == 0.0


def test_ranks_are_dealt_out_in_order():
    assert dealt_out(5, 2) == (0, 0, 1, 1, 2)
