"""The emulated link stands around any communicator, and only where a network is emulated."""

import time
from types import SimpleNamespace

import pytest
import torch

from commhub import Network
from commhub.drivers._link import EmulatedLink, emulate, network_of
from commhub.drivers._stats import Meter
from commhub.drivers._thread import ThreadDriver

SLOW = Network(bandwidth=8000.0, latency=0.03)  # a byte takes a millisecond
SLACK = 0.2
"""Seconds by which a busy machine may be late."""


class Flight:
    """Ends by itself at some time, and counts how often it was asked and waited for."""

    def __init__(self, until):
        self.until, self.asked, self.waited = until, 0, 0

    def is_done(self):
        self.asked += 1
        return time.monotonic() >= self.until

    def wait(self, seconds):
        self.waited += 1
        time.sleep(min(seconds, max(0.0, self.until - time.monotonic())))

    def result(self):
        return torch.ones(1)


class Bare:
    """A communicator whose collectives take so many seconds, and that notes what is asked of it."""

    rank, size = 1, 3

    def __init__(self, seconds=0.0):
        self.seconds, self.called, self.flights = seconds, [], []

    def connect(self, groups):
        self.called.append(("connect", groups))
        return ["made"]

    def launch(self, job):
        self.flights.append(Flight(time.monotonic() + self.seconds))
        return self.flights[-1]

    def abort(self, seconds):
        self.called.append(("abort", seconds))
        return False

    def close(self):
        self.called.append(("close",))


def job(sent_bytes, p=2):
    return SimpleNamespace(p=p, sent_bytes=sent_bytes)


def ended(flight, began):
    """Seconds from then until the flight has ended; waiting took no more than a look now and then."""
    looks = 0
    while not flight.is_done():
        flight.wait(0.5)
        looks += 1
    assert looks <= 3
    return time.monotonic() - began


@pytest.mark.parametrize(("real", "first", "second"), [(0.0, 0.05, 0.08), (0.06, 0.06, 0.08)])
def test_messages_follow_one_another_and_none_is_early_or_much_too_late(real, first, second):
    bare = Bare(real)
    link = EmulatedLink(bare, SLOW)
    began = time.monotonic()
    flights = [link.launch(job(20.0)), link.launch(job(30.0))]
    assert not any(flight.is_done() for flight in flights)  # nothing blocked
    for flight, due in zip(flights, (first, second), strict=True):
        assert due <= ended(flight, began) <= due + SLACK
        assert torch.equal(flight.result(), torch.ones(1))
    assert all(flight.waited <= 2 and flight.asked <= 8 for flight in bare.flights)


def test_a_link_that_was_idle_owes_nothing_and_one_rank_alone_waits_for_nobody():
    link = EmulatedLink(Bare(), SLOW)
    link.launch(job(1.0))
    time.sleep(0.04)
    began = time.monotonic()
    assert 0.04 <= ended(link.launch(job(10.0)), began) <= 0.04 + SLACK  # 10 ms for the bytes
    bare = Bare()
    assert EmulatedLink(bare, SLOW).launch(job(1e9, p=1)) is bare.flights[0]


def test_all_else_goes_to_the_communicator_below():
    bare = Bare()
    link = EmulatedLink(bare, SLOW)
    assert (link.rank, link.size, link.connect([[0]]), link.abort(2.0)) == (1, 3, ["made"], False)
    link.close()
    assert bare.called == [("connect", [[0]]), ("abort", 2.0), ("close",)]


def test_without_a_network_nothing_stands_in_between_and_two_networks_do_not_add_up():
    bare = Bare()
    driver = ThreadDriver(bare, None, None, Meter(), timeout=1.0, label="none")
    try:
        assert (driver.communicator, driver.network) == (bare, None)
        driver.network = SLOW
        assert (driver.network, driver.communicator.bare) == (SLOW, bare)
        driver.network = faster = Network(latency=0.001)
        assert (driver.network, driver.communicator.bare) == (faster, bare)
        driver.network = None
        assert (driver.communicator, driver.network) == (bare, None)
    finally:
        driver.close()
    assert bare.called == [("close",)]
    assert network_of(emulate(emulate(bare, SLOW), None)) is None
