"""A step in virtual time is what one works out by hand, in the order of the driver's own communication thread."""

import pytest

from commhub.advice._replay import Bucket, Flight, Stage, Step, play


def stage(work=0.0, occupied=0.0, latency=0.0, load=0.0):
    return Stage(work=work, flights=(Flight(latency=latency, occupied=occupied, load=load),))


def step(*buckets, computed=1.0, **others):
    return Step(buckets=tuple(buckets), computed=computed, **others)


def test_a_step_without_communication_takes_what_it_computes():
    assert play(step(after=0.5)).seconds == 1.5
    assert play(step(Bucket(ready=0.5), after=0.5)).seconds == 1.5


def test_what_backward_hides_costs_nothing():
    early = Bucket(ready=0.2, stages=(stage(work=0.1, occupied=0.3, latency=0.1),), decode=0.05)
    played = play(step(early))
    assert (played.seconds, played.exposed) == (1.0, 0.0)
    assert played.issued == {(0, 0): pytest.approx(0.3)}
    assert played.landed == {(0, 0): pytest.approx(0.7)}


def test_the_last_bucket_is_exposed_as_a_whole():
    late = Bucket(ready=1.0, stages=(stage(work=0.1, occupied=0.3, latency=0.1), stage(0.2, 0.1)), decode=0.05)
    played = play(step(late, after=0.5, word=0.01))
    assert played.exposed == pytest.approx(0.1 + 0.4 + 0.2 + 0.1 + 0.05 + 0.01)
    assert played.seconds == pytest.approx(1.0 + played.exposed + 0.5)


def test_buckets_follow_one_another_on_the_link_and_latency_overlaps():
    # Two are ready at once: the second's bytes follow the first's, whose latency passes meanwhile.
    buckets = [Bucket(ready=1.0, stages=(stage(occupied=0.3, latency=0.1),)) for _ in range(2)]
    assert play(step(*buckets)).exposed == pytest.approx(0.3 + 0.3 + 0.1)


def test_while_one_travels_the_next_is_encoded():
    buckets = [Bucket(ready=1.0, stages=(stage(work=0.2, occupied=0.3),), decode=0.1) for _ in range(3)]
    # Encoding the first, three on the link one after another, decoding the last.
    assert play(step(*buckets)).exposed == pytest.approx(0.2 + 3 * 0.3 + 0.1)


def test_where_work_takes_longer_than_the_link_it_is_the_limit():
    buckets = [Bucket(ready=1.0, stages=(stage(work=0.3, occupied=0.1),), decode=0.2) for _ in range(3)]
    assert play(step(*buckets)).exposed == pytest.approx(3 * 0.5)


@pytest.mark.parametrize("stages", [1, 2, 3])
@pytest.mark.parametrize("buckets", [1, 2, 5, 12])
def test_collectives_are_issued_in_the_drivers_order(stages, buckets):
    """Stage j of bucket k in the order of (k + 2j, k), whatever is ready first."""
    plans = [Bucket(ready=0.1 * k, stages=(stage(0.01 * (k % 3), 0.2, 0.05),) * stages) for k in range(buckets)]
    played = play(step(*plans, computed=2.0))
    order = sorted(played.issued, key=lambda key: (key[0] + 2 * key[1], key[0]))
    assert list(played.issued) == order
    assert len(order) == stages * buckets
    assert [played.issued[key] for key in order] == sorted(played.issued.values())


def test_with_one_core_encoding_delays_training():
    early = Bucket(ready=0.0, stages=(stage(work=0.3, occupied=0.1),), decode=0.1)
    assert play(step(early, cores=2)).seconds == pytest.approx(1.0)
    assert play(step(early, cores=1)).seconds == pytest.approx(1.4)


def test_moving_bytes_takes_its_share_of_the_cores():
    early = Bucket(ready=0.0, stages=(stage(occupied=0.5, load=0.5),))
    # For half a second training has 1 of 1.5 shares of the core.
    assert play(step(early, cores=1)).seconds == pytest.approx(0.5 + (1 - 0.5 / 1.5))
    assert play(step(early, cores=1.5)).seconds == pytest.approx(1.0)


def test_half_a_core_makes_everything_take_twice_as_long():
    assert play(step(cores=0.5)).seconds == pytest.approx(2.0)


def test_nothing_is_faster_than_its_parts():
    stages = stage(0.02, 0.1, 0.01), stage(0.01, 0.03)
    buckets = [Bucket(ready=0.05 * k, stages=stages, decode=0.02) for k in range(8)]
    link = 8 * 0.13
    work = 8 * 0.05
    for cores in (1, 2, 8):
        seconds = play(step(*buckets, computed=0.5, cores=cores)).seconds
        assert seconds >= max(0.5, link, work, (0.5 + work) / cores) - 1e-9
        assert seconds <= 0.5 + link + work + 0.2
