"""Among many ranks, small shares are worked on together: with the bits of a loop, and not rank by rank."""

from unittest.mock import patch

import pytest
import torch

import commhub
from commhub.testing import bitwise_equal
from commhub.toolkit import _batches
from commhub.toolkit._batches import add_in_order, batches
from commhub.toolkit._layout import Stretch, in_turn, section

from .test_two_step import AsTheyAre, Halves, Shared, hook

SHAPES = ((40, 33), (7,), (32, 64), (0, 3), (), (300,))


def drawn(p, dtype=torch.float32):
    generator = torch.Generator().manual_seed(p)

    def one(shape):
        numbers = torch.randn(shape, generator=generator, dtype=torch.float64)
        return (numbers * torch.randn((), generator=generator, dtype=torch.float64).exp()).to(dtype)

    return [[one(shape) for shape in SHAPES] for _ in range(p)]


@pytest.mark.parametrize("adding", [False, True])
@pytest.mark.parametrize("count", [1, 2, 3, 1000])
def test_a_sum_in_order_has_the_bits_of_a_loop(count, adding):
    for dtype in (torch.float32, torch.float64):
        wide = torch.randn(count, 50, dtype=dtype) * torch.randn(count, 1, dtype=dtype).exp()
        for terms in (wide, wide[:, 3:20]):
            start = torch.randn(terms.shape[1], dtype=dtype)
            expected = start.clone() if adding else torch.full_like(start, -0.0)
            for term in terms:
                expected += term
            add_in_order(start, terms, adding=adding)
            assert bitwise_equal(start, expected)


@pytest.mark.parametrize("shares", [1, 2, 7, 1000])
@pytest.mark.parametrize("size", [0, 1, 100, 1 << 19, 1 << 20])
def test_batches_hold_each_share_once_and_are_small_or_a_single_one(shares, size):
    found = list(batches(shares, size))
    assert [share for some in found for share in range(some.start, some.stop)] == list(range(shares))
    assert all((some.stop - some.start) * size <= 1 << 19 or some.stop - some.start == 1 for some in found)


@pytest.mark.parametrize("p", [1, 2, 3, 16, 90])
@pytest.mark.parametrize("options", [{}, {"within": True}], ids=["beside", "within"])
def test_with_an_exact_codec_the_result_is_the_sum_in_rank_order(p, options):
    given = drawn(p)
    result = commhub.simulate(hook(AsTheyAre(), min_numel=8, **options), given)
    for place in (0, 2, 5):
        expected = given[0][place] * (1 / p)
        for mine in given[1:]:
            expected = expected + mine[place] * (1 / p)
        assert all(bitwise_equal(mine[place], expected) for mine in result.gradients)


@pytest.mark.parametrize("batch", [1, 3000])
@pytest.mark.parametrize("p", [2, 3, 16])
@pytest.mark.parametrize("codec", [AsTheyAre(), Halves(), Shared()], ids=lambda codec: type(codec).__name__)
def test_batches_of_any_size_give_the_same_bits(codec, p, batch):
    def run():
        return commhub.simulate(hook(codec, min_numel=8, within=True), drawn(p), steps=3, buckets=2)

    usual = run()
    with patch.object(_batches, "_BATCH", batch):
        other = run()
    for mine, theirs in zip(usual.gradients, other.gradients, strict=True):
        assert all(map(bitwise_equal, mine, theirs))
    for state, its in zip(usual.states, other.states, strict=True):
        for entries, same in zip(state.export("local").values(), its.export("local").values(), strict=True):
            assert all(map(bitwise_equal, entries.values(), same.values()))


def test_ranks_share_a_layout_for_as_long_as_one_is_in_use():
    arguments = 16, [0, 1], ["a", "b"], [Stretch(0, 40), Stretch(40, 16)]
    first = section(*arguments, 4, in_turn)
    assert section(*arguments, 4, in_turn) is first
    assert section(*arguments, 5, in_turn) is not first
    assert section(*arguments, 4, lambda name, rows, p: in_turn(name, rows, p)) is not first


def test_who_owns_rows_may_be_said_by_what_cannot_be_hashed():
    class Turns(list):
        __call__ = staticmethod(in_turn)

    arguments = 16, [0], ["a"], [Stretch(0, 40)]
    made = [section(*arguments, 4, Turns()) for _ in range(2)]
    assert made[0] is not made[1]
    assert made[0].shares == made[1].shares
