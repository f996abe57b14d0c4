"""How much is sent: the formula, and the paper's own tables from its models' layer shapes."""

from itertools import pairwise

import pytest
import torch
from commhub_powersgd import PowerSGD

import commhub


def resnet18():
    """The paper's CIFAR-10 ResNet-18 (appendix F): 11.2 million elements, 43 MB."""
    shapes = [(64, 3, 3, 3)]
    for inner, outer in pairwise([64, 64, 128, 256, 512]):
        shapes += [(outer, inner, 3, 3)] + 3 * [(outer, outer, 3, 3)]
        shapes += [(outer, inner, 1, 1)] * (inner != outer)
        shapes += 2 * (4 + (inner != outer)) * [(outer,)]
    return [*shapes, (64,), (64,), (10, 512), (10,)]


def lstm():
    """The paper's three-layer LSTM on WikiText-2 with tied embedding (appendix F): 28.9 million elements, 110 MB."""
    return [(28869, 650), *6 * [(2600, 650)], *6 * [(2600,)], (28869,)]


def stats(shapes, rank):
    hook = PowerSGD(rank=rank, start_step=0, error_feedback=False)
    result = commhub.simulate(hook, [[torch.ones(shape) for shape in shapes]], buckets=3)
    return result.hooks[0].compression_stats()


@pytest.mark.parametrize(("rank", "rate"), [(1, 243), (2, 136), (4, 72)])
def test_resnet18_is_compressed_as_in_the_paper(rank, rate):
    """Table 3 rounds to whole numbers: 243, 136, 72."""
    assert round(stats(resnet18(), rank)[0]) == rate


@pytest.mark.parametrize(("rank", "rate"), [(1, 310), (2, 203), (4, 120)])
def test_the_lstm_is_compressed_as_in_the_paper(rank, rate):
    """Table 3 rounds to whole numbers: 310, 203, 120."""
    assert round(stats(lstm(), rank)[0]) == rate


def test_the_simulator_counts_the_same_bytes_as_the_paper():
    ones = [torch.ones(shape) for shape in resnet18()]
    result = commhub.simulate("powersgd_rank2", [ones, ones], start_step=0, buckets=4, error_feedback=False)
    assert round(result.compression) == 136
    assert result.hooks[0].compression_stats()[0] == pytest.approx(result.compression)


@pytest.mark.parametrize("p", [2, 3, 4])
@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("buckets", [1, 2, 9])
def test_sent_bytes_follow_the_formula(p, rank, buckets):
    shapes = [(40, 30), (7,), (12, 8, 3, 3), (3, 4), ()]
    ones = [torch.ones(shape) for shape in shapes]
    result = commhub.simulate("powersgd", [ones] * p, steps=3, rank=rank, start_step=1, buckets=buckets)
    dense = 7 + 12 + 1
    each = (70 + 12 + 72) * rank + dense
    whole = 1200 + 864 + dense
    expected = 2 * (p - 1) / p * 4 * (whole + 2 * each)
    assert result.sent_bytes == pytest.approx((expected,) * p)


def collectives(hook, shapes):
    """How many collectives one bucket takes, by watching the generator."""
    asked = []

    class Watched:
        def prepare(self, setup):
            hook.prepare(setup)

        def reduce(self, bucket):
            exchange, value = hook.reduce(bucket), None
            while True:
                try:
                    request = exchange.send(value)
                except StopIteration:
                    return
                asked.append(request)
                value = yield request

    commhub.simulate(Watched(), [[torch.ones(shape) for shape in shapes]])
    return asked


def test_a_bucket_takes_two_collectives():
    asked = collectives(PowerSGD(start_step=0), [(40, 30), (7,), (50, 50), (2, 2)])
    assert [type(one) for one in asked] == [commhub.AllReduce] * 2
    assert [one.tensor.numel() for one in asked] == [40 + 50 + 7 + 4, 30 + 50]


def test_a_bucket_without_matrices_takes_one():
    assert len(collectives(PowerSGD(start_step=0), [(7,), (2, 2)])) == 1


@pytest.mark.parametrize(("shape", "rate", "compressed"), [((8, 8), 2, True), ((8, 8), 3.9, True), ((8, 8), 4, False)])
def test_the_minimum_compression_rate_is_exclusive(shape, rate, compressed):
    """(8 + 8) * 1 * 4 is not below 8 * 8."""
    hook = PowerSGD(start_step=0, min_compression_rate=rate)
    assert len(collectives(hook, [shape])) == (2 if compressed else 1)


def test_stats_count_compressed_steps_only_and_are_logged_by_rank_0(caplog):
    caplog.set_level("INFO", "commhub")
    grads = [[torch.ones(40, 30), torch.ones(10)]] * 2
    result = commhub.simulate("powersgd", grads, steps=5, start_step=1, stats_frequency=2)
    assert result.hooks[1].compression_stats() == (4 * 1210 / (4 * 80), 4 * 1210, 4 * 80)
    assert [r.getMessage() for r in caplog.records if "powersgd" in r.getMessage()] == [
        "powersgd: 1210 elements sent as 80 by step 2, a rate of 15.1",
        "powersgd: 3630 elements sent as 240 by step 4, a rate of 15.1",
    ]


def test_before_any_compressed_step_the_stats_are_zero():
    assert PowerSGD().compression_stats() == (0.0, 0, 0)
