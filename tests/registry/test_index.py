"""The index reads metadata, runs no plugin, and counts a distribution once."""

import sys
from collections import Counter

import pytest
from importlib_metadata import PathDistribution

import commhub
from commhub.registry import _index, _loading


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


def reads(site, monkeypatch, number):
    """The files of metadata that are read for so many distributions, each with how often, and the modules asked for."""
    for index in range(number):
        site.add(f"dist-{number}-{index}", f"name_{number}_{index}")
    files, modules = Counter(), Counter()
    read, load = PathDistribution.read_text, _loading.import_module

    def read_text(self, name):
        files[f"{self._path}/{name}"] += 1
        return read(self, name)

    def import_module(name):
        modules[name] += 1
        return load(name)

    with monkeypatch.context() as patch:
        patch.setattr(PathDistribution, "read_text", read_text)
        patch.setattr(_loading, "import_module", import_module)
        commhub.installed()
        commhub.hooks()
        commhub.info(f"name_{number}_0")
    return {path: times for path, times in files.items() if str(site.path) in path}, modules


def test_each_file_is_read_once_and_each_spec_module_loaded_once(site, monkeypatch):
    files, modules = reads(site, monkeypatch, 20)
    assert len(files) == 40
    assert {*files.values(), *modules.values()} == {1}
    assert len(modules) == 20


def test_listing_looks_at_directories_once_however_many_plugins_there_are(site, monkeypatch):
    for index in range(8):
        site.add(f"dist-{index}", f"name_{index}")
    looked = []
    monkeypatch.setattr(_index, "_changed", lambda path: looked.append(path) or 0)
    commhub.installed()
    assert len(looked) == 2  # the site has two directories


def test_claims_of_a_plugin_are_found_again_after_a_change(site):
    site.add("some-dist", "some")
    (claim,) = _index.claims()
    site.add("other-dist", "other")
    assert _index.siblings(claim) == (claim,)


def test_what_is_no_path_on_the_search_path_is_left_out(site, monkeypatch):
    site.add("some-dist", "some")
    monkeypatch.setattr(_index, "_search_path", lambda: [None, 3, "a\0b", str(site.path)])
    _index.refresh()
    assert len(rows()) == 1


def test_a_folder_that_is_being_uninstalled_is_no_claim(site):
    site.add("some-dist", "some")
    (site.path / "some_dist-1.0.dist-info").rename(site.path / "~ome_dist-1.0.dist-info")
    _index.refresh()
    assert rows() == []
