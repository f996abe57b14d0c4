"""The link is measured alike on all ranks, and an emulated one is found to be what it is."""

import pytest

from commhub.advice._link import KINDS, Curve, Point, measure
from commhub.drivers import _link as emulated
from commhub.drivers._network import Network
from commhub.protocol._collectives import AllReduce


def line(latency, rate, sizes=(100, 1e4, 1e6, 4e6), cpu=0.0):
    return Curve(tuple(Point(sent_bytes=n, seconds=latency + 8 * n / rate, cpu=cpu) for n in sizes))


def test_a_curve_is_what_was_measured_and_goes_on_at_the_bandwidth():
    curve = line(1e-3, 8e6)
    assert curve.latency == pytest.approx(1e-3, rel=0.2)
    assert curve.bits_per_second == pytest.approx(8e6)
    for size in (1e3, 5e5, 4e6, 1e8):
        assert curve.seconds(size) == pytest.approx(1e-3 + size / 1e6)
    assert curve.seconds(0) == pytest.approx(curve.latency)


def test_the_load_is_of_large_messages():
    assert line(0.0, 8e6, cpu=1.0).load == pytest.approx(0.25)


def measured(network):
    from unittest.mock import patch

    own = emulated.EmulatedLink if network else None
    if own is None:
        return measure(budget=0.03)
    from commhub.drivers._thread import ThreadDriver

    made = ThreadDriver.__init__

    def over_a_link(self, communicator, *arguments, **options):
        made(self, emulated.emulate(communicator, network), *arguments, **options)

    with patch.object(ThreadDriver, "__init__", over_a_link):
        return measure(budget=0.03)


@pytest.mark.parametrize("p", [2, 3])
def test_all_ranks_find_the_same(ranks, p):
    answers = ranks(measured, p, None)
    assert all(answer == answers[0] for answer in answers)
    assert set(answers[0]) == set(KINDS)
    for kind, curve in answers[0].items():
        sizes = [point.sent_bytes for point in curve.points]
        assert sizes == sorted(set(sizes)), kind
        assert all(point.seconds > 0 for point in curve.points)


def test_an_emulated_link_is_found_to_be_what_it_is(ranks):
    curves = ranks(measured, 2, Network(bandwidth=100e6, latency=5e-3))[0]
    for curve in curves.values():
        assert curve.latency >= 5e-3
        # Never faster than the link; how much slower the machine is, a test cannot know.
        assert curve.bits_per_second < 1.1 * 100e6
    assert curves[AllReduce].points[-1].seconds >= 0.95 * 8 * curves[AllReduce].points[-1].sent_bytes / 100e6
