"""Which rank sums which rows of a parameter."""

import pytest

from commhub.toolkit._layout import Stretch, in_turn, section


def owners(names, sizes, p, width=64):
    spans, start = [], 0
    for size in sizes:
        spans.append(Stretch(start, size))
        start += size
    made = section(width, range(len(names)), names, spans, p, in_turn)
    found = {}
    for rank, parts in enumerate(made.owned):
        for part in parts:
            for row in range(len(part.rows)):
                found[names[part.place], part.skipped // width + row] = rank
    return found, made


def test_who_owns_a_row_depends_on_its_name_and_number_alone():
    together, _ = owners(["a", "b", "c"], [1000, 640, 70], 3)
    apart = {}
    for name, size in (("c", 70), ("a", 1000), ("b", 640)):
        apart |= owners([name], [size], 3)[0]
    assert together == apart


@pytest.mark.parametrize("p", [1, 2, 3, 7, 40])
def test_every_row_is_owned_once_and_shares_are_even(p):
    names, sizes = [f"layer.{i}" for i in range(30)], [64 * (i + 1) + i for i in range(30)]
    found, made = owners(names, sizes, p)
    assert len(found) == made.rows == sum(-(-size // 64) for size in sizes)
    assert sorted(row for share in made.shares for row in share if row < made.rows) == list(range(made.rows))
    counts = [sum(row < made.rows for row in share) for share in made.shares]
    assert max(counts) - made.rows / p < len(names)
    assert {len(share) for share in made.shares} == {max(counts)}


def test_many_parameters_of_one_row_spread_over_the_ranks():
    found, _ = owners([f"layer.{i}" for i in range(40)], [64] * 40, 4)
    assert all(5 <= list(found.values()).count(rank) <= 15 for rank in range(4))
