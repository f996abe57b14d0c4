"""Steps that were timed in turn: ratios by rounds, with what they lie between; limits; what an interface counts."""

import random
import statistics

import pytest

from commhub.bench._interface import sent_bytes
from commhub.bench._intervals import together
from commhub.bench._limits import limits
from commhub.bench._table import limit_rows, notes, table
from commhub.bench._timed import TimedStep, ratio


def steps(seconds, **figures):
    """One step for each of these times, in rounds of the same numbers."""
    known = {"cpu_seconds": 0.3, "encode": 0.0, "wait": 0.0, "decode": 0.0, "wire": 0.0, "busy": 0.0}
    known |= {"sent_bytes": 0.0, "reference_bytes": 1e6}
    return tuple(TimedStep(repeat=n, seconds=each, **(known | figures)) for n, each in enumerate(seconds))


def test_a_ratio_is_of_steps_of_the_same_round():
    # A machine that slows down by and by: the ratio is 2 in each round.
    base, slow = steps([1.0, 2.0, 4.0, 8.0]), steps([2.0, 4.0, 8.0, 16.0])
    found = ratio(slow[1:], base[:3])
    assert (found.median, found.low, found.high) == (2.0, 2.0, 2.0)
    assert ratio(slow[:1], base[1:]) is None
    assert ratio((), ()) is None


@pytest.mark.parametrize(("count", "left_out"), [(4, 0), (6, 0), (8, 0), (9, 1), (15, 3), (20, 5)])
def test_the_interval_is_that_of_the_sign_test(count, left_out):
    """Tables of the sign test's intervals: of 15 values, from the 4th to the 12th."""
    times = random.Random(count).sample(range(1, 100), count)
    found = ratio(steps(times), steps([1.0] * count))
    ordered = sorted(times)
    assert (found.low, found.high) == (ordered[left_out], ordered[-1 - left_out])
    assert found.median == statistics.median(times)


@pytest.mark.parametrize("count", [6, 9, 15, 30])
def test_the_interval_holds_the_true_median_as_often_as_it_says(count):
    noise, held = random.Random(0), 0
    for _ in range(2000):
        found = ratio(steps([noise.expovariate(1.0) for _ in range(count)]), steps([1.0] * count))
        held += found.low <= 0.6931 <= found.high
    assert held >= 0.94 * 2000  # 2,000 draws of 95 % lie above that but for one time in fifty
    assert held < 2000


@pytest.fixture
def on_a_link(make_result, make_outcome):
    """An outcome on 100 mbit/s, a step without communication taking 0.2 s."""
    plain = make_result(race=steps([1.0, 1.2, 1.1], sent_bytes=1e7, wire=0.85, busy=0.9, wait=0.6, cpu_seconds=0.5))
    half = make_result(
        "fp16", race=steps([0.6, 0.6, 0.6], sent_bytes=5e6, wire=0.5, busy=0.5, wait=0.1, interface_bytes=5.1e6)
    )
    little = make_result("powersgd_rank2", race=steps([0.3, 0.3, 0.3], sent_bytes=1e5, wire=0.02, busy=0.1, encode=0.1))
    return make_outcome(plain, half, little, floor=steps([0.2, 0.2, 0.2], cpu_seconds=0.1), bandwidth=1e8, hosts=2)


def test_the_floor_is_the_longer_of_what_the_bytes_take_and_a_step_without_any(on_a_link):
    plain, half, little = (limits(on_a_link, result) for result in on_a_link.results)
    assert [x.floor_seconds for x in (plain, half, little)] == pytest.approx([0.8, 0.4, 0.2])
    assert [x.over_floor for x in (plain, half, little)] == pytest.approx([1.1 / 0.8, 1.5, 1.5])


def test_bus_bandwidth_share_hidden_and_cpu_time(on_a_link):
    plain, half, little = (limits(on_a_link, result) for result in on_a_link.results)
    assert plain.bus_bits_per_second == pytest.approx(8e7 / 0.85)
    assert [x.hidden for x in (plain, half, little)] == pytest.approx([1 / 3, 0.8, 0.0])
    assert [x.extra_cpu_seconds for x in (plain, half)] == pytest.approx([0.4, 0.2])
    assert [x.interface_bytes for x in (plain, half)] == [None, 5.1e6]
    assert half.ratio.median == pytest.approx(0.6 / 1.1)


def test_without_a_link_or_a_floor_nothing_is_made_up(make_result, make_outcome):
    result = make_result(race=steps([1.0], sent_bytes=1e6))
    found = limits(make_outcome(result), result)
    assert (found.floor_seconds, found.over_floor, found.extra_cpu_seconds) == (None, None, None)
    assert (found.bus_bits_per_second, found.hidden) == (None, None)
    assert limits(make_outcome(make_result()), make_result()) is None
    assert limit_rows(make_outcome(make_result())) == []


def test_times_are_those_of_steps_in_turn_where_there_are_any(make_result, on_a_link):
    assert make_result(times=(9.0,) * 8, race=steps([1.0, 3.0, 2.0])).step_seconds == 2.0
    said = "\n".join(notes(on_a_link))
    assert "one of each hook in turn" in said
    assert "steps 3 to 8" not in said


def test_the_table_has_a_row_of_limits_for_each_hook(on_a_link):
    rows = limit_rows(on_a_link)
    assert rows[1] == ("fp16", "600 ms", "0.545 (0.500-0.600)", "400 ms", "1.50x", "80.0 mbit/s", "80 %", "200 ms",
                       "5.00 MB", "5.10 MB")  # fmt: skip
    lines = table(on_a_link).splitlines()
    assert "/ allreduce (95 %)" in lines[6]
    assert [line.split()[0] for line in lines[8:]] == ["allreduce", "fp16", "powersgd_rank2"]


def test_a_column_that_nothing_is_known_for_is_left_out(make_result, make_outcome):
    outcome = make_outcome(make_result(race=steps([1.0], sent_bytes=1e6)), floor=steps([0.5]))
    header = table(outcome).splitlines()[4]
    assert "floor" in header
    assert "interface" not in header
    assert "bus" not in header


COUNTERS = """Inter-|   Receive           |  Transmit
 face |bytes    packets errs drop fifo frame compressed multicast|bytes packets errs drop fifo colls carrier compressed
    lo: 1000 10 0 0 0 0 0 0 2000 20 0 0 0 0 0 0
  eth0:3123456789 11 0 0 0 0 0 0 41234567890 21 0 0 0 0 0 0
"""


def test_an_interfaces_bytes_are_read_from_the_kernels_counters(tmp_path):
    file = tmp_path / "dev"
    file.write_text(COUNTERS)
    assert sent_bytes("eth0", file) == 41234567890
    assert sent_bytes("lo", file) == 2000
    assert sent_bytes("eth1", file) is None
    assert sent_bytes("eth0", tmp_path / "none") is None
    assert sent_bytes("lo") is not None


@pytest.mark.parametrize(
    ("intervals", "length"),
    [
        ([], 0),
        ([(1, 3)], 2),
        ([(1, 3), (5, 6)], 3),
        ([(2, 6), (1, 3)], 5),
        ([(1, 9), (2, 3), (4, 5)], 8),
        ([(1, 2), (1, 2), (2, 3)], 2),
    ],
)
def test_overlaps_count_once(intervals, length):
    assert together(intervals) == length
