"""The emulated link stands around any communicator, and only where a network is emulated."""

from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch

from commhub import Network
from commhub.drivers import _link
from commhub.drivers._link import EmulatedLink, emulate, network_of
from commhub.drivers._thread import ThreadDriver
from commhub.drivers._timeline import Recorder

SLOW = Network(bandwidth=8000.0, latency=0.03)  # a byte takes a millisecond


class Clock:
    """What the link takes for ``time``: only sleeping makes it go on."""

    def __init__(self):
        self.now = 100.0

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        assert seconds > 0
        self.now += seconds


@pytest.fixture
def clock(monkeypatch):
    made = Clock()
    monkeypatch.setattr(_link, "time", made)
    return made


class Flight:
    """Ends by itself at some time, and counts how often it was waited for."""

    def __init__(self, clock, until):
        self.clock, self.until, self.waited = clock, until, 0

    def is_done(self):
        return self.clock.now >= self.until

    def wait(self, seconds):
        self.waited += 1
        self.clock.now = min(self.clock.now + seconds, max(self.clock.now, self.until))

    def result(self):
        return torch.ones(1)


class Bare:
    """A communicator whose collectives take so many seconds, and that notes what is asked of it."""

    rank, size = 1, 3

    def __init__(self, clock=None, seconds=0.0):
        self.clock, self.seconds, self.called, self.flights = clock, seconds, [], []

    def connect(self, groups):
        self.called.append(("connect", groups))
        return ["made"]

    def launch(self, job):
        self.flights.append(Flight(self.clock, self.clock.now + self.seconds))
        return self.flights[-1]

    def abort(self, seconds):
        self.called.append(("abort", seconds))
        return False

    def close(self):
        self.called.append(("close",))


def job(sent_bytes, p=2):
    return SimpleNamespace(p=p, sent_bytes=sent_bytes)


def waits(flight):
    """How many waits it takes until the flight has ended."""
    count = 0
    while not flight.is_done():
        flight.wait(0.5)
        count += 1
    return count


@pytest.mark.parametrize(("real", "first", "second"), [(0.0, 0.05, 0.08), (0.06, 0.06, 0.08)])
def test_messages_follow_one_another_and_none_is_early_or_late(clock, real, first, second):
    bare, began = Bare(clock, real), clock.now
    link = EmulatedLink(bare, SLOW)
    flights = [link.launch(job(20.0)), link.launch(job(30.0))]
    assert clock.now == began  # nothing blocked
    assert not any(flight.is_done() for flight in flights)
    for flight, due in zip(flights, (first, second), strict=True):
        assert waits(flight) == 1  # a wait ends when the flight does, be it the real one's end or the network's
        assert clock.now - began == pytest.approx(due)
        assert torch.equal(flight.result(), torch.ones(1))
    assert [flight.waited for flight in bare.flights] == [int(real > 0), 0]


def test_a_flight_that_the_network_would_have_ended_is_waited_for_and_a_wait_is_no_longer_than_it_may_be(clock):
    bare, began = Bare(clock, 2.0), clock.now
    flight = EmulatedLink(bare, SLOW).launch(job(20.0))
    assert waits(flight) == 4
    assert (clock.now - began, bare.flights[0].waited) == (2.0, 4)


def test_a_link_that_was_idle_owes_nothing_and_one_rank_alone_waits_for_nobody(clock):
    link = EmulatedLink(Bare(clock), SLOW)
    link.launch(job(1.0))
    clock.sleep(0.04)
    began = clock.now
    waits(link.launch(job(10.0)))
    assert clock.now - began == pytest.approx(0.04)  # 10 ms for the bytes
    bare = Bare(clock)
    assert EmulatedLink(bare, SLOW).launch(job(1e9, p=1)) is bare.flights[0]


def test_all_else_goes_to_the_communicator_below():
    bare = Bare()
    link = EmulatedLink(bare, SLOW)
    assert (link.rank, link.size, link.connect([[0]]), link.abort(2.0)) == (1, 3, ["made"], False)
    link.close()
    assert bare.called == [("connect", [[0]]), ("abort", 2.0), ("close",)]


def test_without_a_network_nothing_stands_in_between_and_two_networks_do_not_add_up():
    bare = Bare()
    driver = ThreadDriver(bare, Mock(), Mock(), Recorder(), timeout=1.0, label="none")
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
