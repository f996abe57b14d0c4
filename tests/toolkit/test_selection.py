"""Which parameters are compressed, and that the others are averaged exactly in the same stage."""

import attrs
import pytest
import torch

import commhub
from commhub.toolkit import Rules, Selection


@attrs.define(eq=False)
class Zeroing:
    """Sends zeros of what is selected; says what it chose and asked for."""

    selection: Selection
    chosen: object = None
    asked: list = attrs.Factory(list)

    def prepare(self, setup):
        self.chosen = self.selection.choose(setup)

    def reduce(self, bucket):
        places = self.selection.places(bucket)
        if not places:
            self.asked.append("exactly")
            yield from self.selection.exactly(bucket)
            return
        zeros = torch.cat([torch.zeros_like(bucket.segments[i]) for i in places])
        exchange = self.selection.beside(bucket, commhub.AllReduce(zeros))
        request = next(exchange)
        self.asked.append(request if isinstance(request, tuple) else (request,))
        with pytest.raises(StopIteration) as ended:
            exchange.send((yield request))
        assert not ended.value.value.any()
        for i in places:
            bucket.segments[i].zero_()


def gradients(rank, dtype=torch.float32):
    drawn = torch.Generator().manual_seed(rank)
    shapes = [(40, 40), (2000,), (5, 5), (0, 9), ()]
    return [torch.randn(shape, generator=drawn, dtype=dtype) for shape in shapes]


def chosen(rules=None, defaults=None, **options):
    hook = Zeroing(Selection(Rules(rules or {}, defaults or {}), **options))
    return commhub.simulate(hook, [gradients(0)]).hooks[0].chosen


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({}, "0124"),  # never what is empty
        ({"min_numel": 26}, "01"),
        ({"min_numel": 25, "max_numel": 1600}, "02"),
        ({"dense_small": True}, "0"),
        ({"rules": {"[12]": "dense"}}, "04"),
        ({"start_step": 9}, "0124"),
    ],
)
def test_rules_and_sizes_choose(options, names):
    assert list(chosen(**options)) == [*names]


def test_a_rule_may_say_for_a_parameter_whether_small_ones_are_left_out():
    found = chosen({"2": {"dense_small": False}, "0": {"bits": 4}}, {"dense_small": True, "bits": 8})
    assert found == {"0": {"dense_small": True, "bits": 4}, "2": {"dense_small": False, "bits": 8}}


def test_complex_parameters_are_not_compressed():
    mixed = [torch.ones(4, 4), torch.ones(4, 4, dtype=torch.complex64)]
    run = commhub.simulate(Zeroing(Selection(Rules({}, {}))), [mixed] * 2)
    assert list(run.hooks[0].chosen) == ["0"]
    assert torch.equal(run.gradients[0][1], mixed[1])


@pytest.mark.parametrize("p", [2, 3])
@pytest.mark.parametrize("buckets", [1, 5])
def test_the_rest_travels_beside_and_is_the_exact_mean(p, buckets):
    given = [gradients(rank, torch.float64) for rank in range(p)]
    run = commhub.simulate(Zeroing(Selection(Rules({"2": "dense"}, {}), min_numel=2)), given, buckets=buckets)
    for rank in range(p):
        for i, found in enumerate(run.gradients[rank]):
            mean = sum(one[i] for one in given) / p
            torch.testing.assert_close(found, mean if i in (2, 3, 4) else torch.zeros_like(mean), rtol=0, atol=1e-15)
    if buckets == 1:
        assert [[type(one).__name__ for one in stage] for stage in run.hooks[0].asked] == [["AllReduce", "AllReduce"]]


def test_the_first_steps_are_exact_and_the_next_one_is_not():
    hook = Zeroing(Selection(Rules({}, {}), start_step=2))
    for steps, exact in ((2, True), (3, False)):
        run = commhub.simulate(hook, [gradients(0), gradients(0)], steps=steps)
        assert torch.equal(run.gradients[0][0], gradients(0)[0]) == exact
