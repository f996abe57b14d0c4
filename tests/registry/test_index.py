"""The index reads metadata, runs no plugin, and counts a distribution once."""

import sys

import pytest

from commhub.registry import _index


def rows():
    return [(claim.name, claim.kind, claim.distribution, claim.version) for claim in _index.claims()]


def test_nothing_installed_is_an_empty_index(site):
    assert rows() == []


def test_claims_are_sorted_by_name_then_distribution(site):
    site.add("b-dist", "zeta", "alpha")
    site.add("a-dist", "zeta", averagers=["mid"])
    assert rows() == [
        ("alpha", "hook", "b-dist", "1.0"),
        ("mid", "averager", "a-dist", "1.0"),
        ("zeta", "hook", "a-dist", "1.0"),
        ("zeta", "hook", "b-dist", "1.0"),
    ]


def test_reading_the_index_imports_nothing_of_a_plugin(site):
    module = site.add("some-dist", "some")
    assert rows()
    assert module not in sys.modules


def test_names_and_distributions_are_normalised(site):
    site.add("Some_Dist", announce=["My-Hook"])
    assert rows() == [("my_hook", "hook", "some-dist", "1.0")]


def test_a_distribution_found_twice_counts_once_and_the_first_wins(site):
    site.add("some-dist", "some", version="2.0")
    site.add("some-dist", "some", "old", version="1.0", where="second")
    assert rows() == [("some", "hook", "some-dist", "2.0")]


def test_the_first_wins_even_if_it_offers_nothing(site):
    site.add("some-dist", version="2.0")
    site.add("some-dist", "some", version="1.0", where="second")
    assert rows() == []


def test_a_new_distribution_is_seen_without_a_refresh(site):
    site.add("some-dist", "some")
    assert len(rows()) == 1
    refresh = _index.refresh
    _index.refresh = lambda: None
    try:
        site.add("other-dist", "other")
    finally:
        _index.refresh = refresh
    assert len(rows()) == 2


@pytest.mark.parametrize("damage", ["", "Name", "\xff", "Version: x\n"])
def test_damaged_metadata_hides_no_other_package(site, damage):
    site.add("some-dist", "some")
    site.add("bad-dist", "bad")
    (site.path / "bad_dist-1.0.dist-info" / "METADATA").write_text(damage, encoding="latin-1")
    _index.refresh()
    assert ("some", "hook", "some-dist", "1.0") in rows()


def test_damaged_entry_points_hide_no_other_package(site):
    site.add("some-dist", "some")
    site.add("bad-dist", "bad")
    (site.path / "bad_dist-1.0.dist-info" / "entry_points.txt").write_text("[commhub.hooks.v1]\nno equals sign")
    _index.refresh()
    assert ("some", "hook", "some-dist", "1.0") in rows()


@pytest.mark.parametrize(
    ("requires", "compatible"),
    [
        ([], True),
        (["commhub"], True),
        (["commhub>=0.1,<1"], True),
        (["Commhub >= 0.1"], True),
        (["commhub>=99"], False),
        (["commhub[bench]<0.0.1"], False),
        (["commhub>=0.1", "commhub<0.0.1"], False),
        (['commhub>=99; extra == "test"'], True),
        (['commhub>=99; python_version < "3"'], True),
        (["commhub-fp16>=99"], True),
        (["torch>=99"], True),
    ],
)
def test_the_declared_range_decides_compatibility(site, requires, compatible):
    site.add("some-dist", "some", requires=requires)
    (claim,) = _index.claims()
    assert (claim.incompatible is None) == compatible


def test_a_requirement_that_cannot_be_read_is_named(site):
    site.add("some-dist", "some", requires=["commhub>=>1"])
    (claim,) = _index.claims()
    assert claim.incompatible == "its requirement 'commhub>=>1' cannot be read"


def test_other_groups_are_no_claims(site):
    site.add("some-dist", "some")
    file = site.path / "some_dist-1.0.dist-info" / "entry_points.txt"
    file.write_text(file.read_text() + "\n[commhub.hooks.v2]\nnext = some_module\n")
    _index.refresh()
    assert [name for name, *_ in rows()] == ["some"]
