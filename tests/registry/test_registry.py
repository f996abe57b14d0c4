"""What a name resolves to, the status of every claim, and the way from a name to a hook."""

import sys
from types import SimpleNamespace

import pytest

import commhub
from commhub.registry import _registry
from commhub.registry._recipe import choose, resolve

OPTIONS = """options=(
    Option(name='rank', type=int, default=1, known_as=('matrix_rank',)),
    Option(name='rate', type=float, default=2.0),
    Option(name='warm_start', type=bool, default=True),
    Option(name='seed', type=int),
    Option(name='mode', type=str, default='a', choices=('a', 'b')),
    Option(name='inner', type='hook', default='fp16'),
    Option(name='periods', type=dict),
)"""

MADE = """
class Made:
    def __init__(self, **options):
        self.options = options
        if options.get("rank", 1) < 1:
            raise ValueError("rank must be at least 1")
        if options.get("rank") == 13:
            raise RuntimeError("unlucky")
        if options.get("rank") == 14:
            from commhub import UnknownHookError
            raise UnknownHookError("inner")
"""


def statuses():
    return {f"{row.distribution}:{row.name}": row.status for row in commhub.installed()}


def test_a_hook_is_listed_with_its_summary(site):
    site.add("some-dist", "some")
    (row,) = commhub.installed()
    assert row.as_dict() == {
        "name": "some",
        "kind": "hook",
        "distribution": "some-dist",
        "version": "1.0",
        "status": "ok",
        "summary": "A test plugin.",
        "error": None,
    }
    assert row.spec.name == "some"


def test_rows_are_sorted_and_the_same_each_time(site):
    for distribution, name in [("z-dist", "beta"), ("m-dist", "alpha"), ("a-dist", "gamma")]:
        site.add(distribution, name)
    first = commhub.installed()
    _registry.refresh()
    assert [row.name for row in first] == ["alpha", "beta", "gamma"]
    assert [row.as_dict() for row in commhub.installed()] == [row.as_dict() for row in first]


def test_only_the_plugin_that_owns_the_name_is_loaded(site):
    other = site.add("other-dist", "other")
    mine = site.add("some-dist", "some")
    resolve("some")
    assert mine in sys.modules
    assert other not in sys.modules


def test_hooks_maps_bare_names_of_both_kinds_to_their_rows(site):
    site.add("some-dist", "some", averagers=["often"])
    site.add("bad-dist", "bad", source="import no_such_module_at_all")
    assert {name: row.kind for name, row in commhub.hooks().items()} == {"often": "averager", "some": "hook"}


# A broken plugin


def test_a_broken_plugin_is_listed_with_its_reason_and_harms_nobody(site):
    site.add("bad-dist", "bad", source="import no_such_module_at_all")
    site.add("some-dist", "some")
    bad, some = commhub.installed()
    assert (bad.status, bad.spec, some.status) == ("broken", None, "ok")
    assert "no_such_module_at_all" in bad.error
    assert resolve("some").name == "some"


def test_using_a_broken_plugin_raises_from_the_original_each_time(site):
    site.add("bad-dist", "bad", source="import no_such_module_at_all")
    for _ in range(2):
        with pytest.raises(commhub.PluginError, match=r"bad-dist 1\.0") as caught:
            resolve("bad")
        assert isinstance(caught.value.__cause__, ModuleNotFoundError)


def test_info_describes_a_broken_plugin(site):
    site.add("bad-dist", "bad", source="raise SystemExit(0)")
    row = commhub.info("bad")
    assert (row.status, "SystemExit" in row.error) == ("broken", True)


def test_metadata_and_specs_that_disagree_are_broken(site):
    site.add("some-dist", "some", announce=["some", "ghost"])
    assert statuses() == {"some-dist:ghost": "broken", "some-dist:some": "broken"}


# Collisions


def test_two_third_parties_with_one_name_are_a_conflict(site):
    site.add("a-dist", "same")
    site.add("b-dist", "same")
    assert statuses() == {"a-dist:same": "conflict", "b-dist:same": "conflict"}
    with pytest.raises(commhub.HookConflictError, match=r"a-dist and b-dist.*'a-dist:same' or 'b-dist:same'"):
        resolve("same")
    assert "same" not in commhub.hooks()


def test_a_conflict_is_resolved_by_naming_the_distribution(site):
    site.add("a-dist", "same")
    site.add("b-dist", "same")
    recipe = resolve("B_Dist:SAME")
    assert (recipe.distribution, str(recipe)) == ("b-dist", "b-dist:same")
    assert commhub.info("a-dist:same").status == "conflict"


def test_disabling_one_of_two_resolves_the_conflict(site, monkeypatch):
    site.add("a-dist", "same")
    site.add("b-dist", "same")
    monkeypatch.setenv("COMMHUB_DISABLE", "a-dist")
    assert statuses() == {"a-dist:same": "disabled", "b-dist:same": "ok"}
    assert str(resolve("same")) == "same"


def test_a_documented_name_belongs_to_its_distribution(site):
    site.add("a-dist", "fp16")
    site.add("commhub-fp16", "fp16")
    assert statuses() == {"a-dist:fp16": "shadowed", "commhub-fp16:fp16": "ok"}
    assert resolve("fp16").distribution == "commhub-fp16"
    assert str(resolve("a-dist:fp16")) == "a-dist:fp16"


def test_a_documented_name_is_not_taken_over_while_its_owner_is_missing(site):
    site.add("a-dist", "fp16")
    assert statuses() == {"a-dist:fp16": "shadowed"}
    with pytest.raises(commhub.UnknownHookError, match="pip install commhub-fp16"):
        resolve("fp16")


def test_an_alias_cannot_be_taken_over_either(site):
    site.add("a-dist", "power_sgd")
    site.add("commhub-powersgd", "powersgd", "powersgd_rank2")
    assert statuses()["a-dist:power_sgd"] == "shadowed"
    assert resolve("power_sgd").distribution == "commhub-powersgd"


# Incompatible and disabled


def test_an_incompatible_plugin_is_found_without_importing_it(site):
    module = site.add("old-dist", "old", requires=["commhub>=99"])
    (row,) = commhub.installed()
    assert (row.status, module in sys.modules) == ("incompatible", False)
    assert "commhub>=99" in row.error
    with pytest.raises(commhub.PluginError, match=r"old-dist 1\.0 offers 'old' but it needs commhub>=99"):
        resolve("old")


def test_an_incompatible_plugin_conflicts_with_nobody(site):
    site.add("a-dist", "same", requires=["commhub>=99"])
    site.add("b-dist", "same")
    assert statuses() == {"a-dist:same": "incompatible", "b-dist:same": "ok"}


@pytest.mark.parametrize("words", ["one", "ONE", "x, one ,", "some-dist:one"])
def test_a_name_can_be_disabled(site, monkeypatch, words):
    site.add("some-dist", "one", "two-b".replace("-", "_"))
    monkeypatch.setenv("COMMHUB_DISABLE", words)
    expected = "ok" if ":" in words else "disabled"
    assert statuses()["some-dist:one"] == expected
    assert statuses()["some-dist:two_b"] == "ok"


def test_a_disabled_distribution_stays_listed_and_is_not_imported(site, monkeypatch):
    module = site.add("some-dist", "one", "two")
    monkeypatch.setenv("COMMHUB_DISABLE", "Some_Dist")
    assert set(statuses().values()) == {"disabled"}
    assert module not in sys.modules
    with pytest.raises(commhub.UnknownHookError, match="disabled by COMMHUB_DISABLE"):
        resolve("one")


def test_a_star_disables_all_that_is_not_documented(site, monkeypatch):
    site.add("a-dist", "fp16")
    site.add("b-dist", "mine")
    site.add("commhub-fp16", "fp16")
    monkeypatch.setenv("COMMHUB_DISABLE", "*")
    assert statuses() == {
        "a-dist:fp16": "disabled",
        "b-dist:mine": "disabled",
        "commhub-fp16:fp16": "ok",
    }


def test_an_alias_disables_what_it_stands_for(site, monkeypatch):
    site.add("commhub-fp16", "fp16")
    monkeypatch.setenv("COMMHUB_DISABLE", "FP16_COMPRESS")
    assert statuses() == {"commhub-fp16:fp16": "disabled"}


# Names


@pytest.mark.parametrize(
    "name", ["powersgd_rank2", "PowerSGD-Rank2", "POWER_SGD_RANK2", "power-sgd-rank2", " powersgd_rank2 "]
)
def test_case_dashes_and_aliases_lead_to_one_hook(site, name):
    site.add("commhub-powersgd", "powersgd", "powersgd_rank2")
    assert str(resolve(name)) == "powersgd_rank2"
    assert str(resolve(f"commhub-powersgd:{name}")) == "powersgd_rank2"
    assert commhub.info(name).name == "powersgd_rank2"


def test_an_unknown_name_gets_a_suggestion(site):
    site.add("some-dist", "gradient_drop")
    with pytest.raises(commhub.UnknownHookError, match="Did you mean 'gradient_drop'"):
        resolve("gradient_dorp")


def test_a_documented_name_that_is_not_installed_says_what_to_install(site):
    with pytest.raises(commhub.UnknownHookError, match="pip install commhub-quantize"):
        resolve("quantize_per_channel")
    with pytest.raises(commhub.UnknownHookError, match="pip install commhub-powersgd"):
        resolve("POWER_SGD")


def test_a_distribution_that_lacks_the_name_says_who_has_it(site):
    site.add("a-dist", "mine")
    site.add("b-dist", "other")
    with pytest.raises(commhub.UnknownHookError, match="b-dist offers no 'mine'; a-dist does"):
        resolve("b-dist:mine")


def test_a_malformed_name_is_an_option_error(site):
    with pytest.raises(commhub.HookOptionError, match="position 2"):
        resolve("a b(")


def test_the_wrong_kind_is_refused(site):
    site.add("some-dist", "some", averagers=["often"])
    assert resolve("often", kind="averager").kind == "averager"
    with pytest.raises(commhub.UnknownHookError, match="'often' of some-dist is of kind 'averager'"):
        resolve("often", kind="hook")


# Options


def test_defaults_preset_and_given_options(site):
    fields = "options=(Option(name='rank', type=int, default=1), Option(name='rate', type=float, default=2))"
    site.add("some-dist", "some", fields=f"{fields}, preset={{'rank': 2}}")
    recipe = resolve("some", {"rate": 3})
    assert dict(recipe.given) == {"rate": 3.0}
    assert dict(recipe.options) == {"rank": 2, "rate": 3.0}
    assert str(recipe) == "some(rate=3.0)"
    with pytest.raises(commhub.HookOptionError, match="rank is preset to 2"):
        resolve("some", {"rank": 3})
    with pytest.raises(commhub.HookOptionError, match="rank is preset to 2"):
        resolve("some", {"rank": 2})


def test_options_of_a_hook_string_and_of_a_call_are_one(site):
    site.add("some-dist", "some", fields=OPTIONS)
    written = resolve("some(rate=3, rank=4)")
    assert written == resolve("some", {"rank": 4, "rate": 3.0}) == resolve("some(rate=3)", {"rank": 4})
    assert str(written) == "some(rank=4, rate=3.0)"
    with pytest.raises(commhub.HookOptionError, match="'rank' is given in the hook string and as"):
        resolve("some(rank=4)", {"rank": 4})


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"rank": True}, "rank is True, not an int"),
        ({"rank": "4"}, "rank is '4', not an int"),
        ({"rank": None}, "rank is None, not an int"),
        ({"warm_start": "true"}, "warm_start is 'true', not a bool"),
        ({"mode": "c"}, "mode is 'c', none of 'a', 'b'"),
        ({"inner": 3}, "inner is 3, not a hook string"),
        ({"inner": "fp16("}, "inner: hook string .*never closed"),
        ({"periods": {1: object()}}, "cannot be written in a hook string"),
        ({"rat": 1}, r"no option 'rat'. Did you mean 'rate'\? Its options are inner, mode"),
        ({"wire": "bf16"}, "wire is an argument of commhub.register"),
        ({"matrix_rank": 2}, "what is called 'matrix_rank' elsewhere is 'rank' here"),
    ],
)
def test_wrong_options_say_what_and_where(site, options, what):
    site.add("some-dist", "some", fields=OPTIONS)
    with pytest.raises(commhub.HookOptionError, match=what) as caught:
        resolve("some", options)
    assert "cannot be written" in what or str(caught.value).startswith("some (some-dist 1.0): ")


@pytest.mark.parametrize("resolved", [resolve, choose])
def test_who_gives_a_state_learns_where_its_fields_go(site, resolved):
    site.add("some-dist", "some", fields=OPTIONS)
    for hook, options in (("some", {"state": None}), ("some(state=3)", {})):
        with pytest.raises(commhub.HookOptionError, match=r"no state is given.*options of the hook"):
            resolved(hook, options)
    with pytest.raises(commhub.HookOptionError, match="no state is given"):
        choose(SimpleNamespace(reduce=len), {"state": 3})


def test_a_hook_without_options_says_so(site):
    site.add("some-dist", "some")
    with pytest.raises(commhub.HookOptionError, match="no option 'rank'; it takes none"):
        resolve("some", {"rank": 1})


def test_nested_hook_strings_are_kept_canonical(site):
    site.add("some-dist", "some", fields=OPTIONS)
    recipe = resolve("some", {"inner": " POWER-SGD( rank = 4 )"})
    assert recipe.options["inner"] == "powersgd(rank=4)"
    assert str(recipe) == "some(inner=powersgd(rank=4))"
    assert resolve(str(recipe)) == recipe


def test_values_are_plain_even_where_subclasses_are_given(site):
    site.add("some-dist", "some", "other", fields=OPTIONS)
    recipe = resolve("some", {"inner": commhub.HookType.OTHER})
    assert type(recipe.options["inner"]) is str
    assert str(recipe) == "some(inner=other)"


# From a recipe to an instance


def test_make_calls_the_factory_with_all_options(site):
    module = site.add("some-dist", "some", fields=OPTIONS)
    site.module(f"{module}_factory", MADE)
    made = resolve("some", {"rank": 3}).make()
    assert made.options == dict(resolve("some", {"rank": 3}).options)
    assert made.options["rate"] == 2.0


def test_the_factory_is_imported_only_when_made(site):
    module = site.add("some-dist", "some")
    site.module(f"{module}_factory", MADE)
    recipe = resolve("some")
    assert f"{module}_factory" not in sys.modules
    assert recipe.load().__name__ == "Made"


def test_a_factory_that_refuses_its_options_is_an_option_error(site):
    module = site.add("some-dist", "some", fields=OPTIONS)
    site.module(f"{module}_factory", MADE)
    with pytest.raises(commhub.HookOptionError, match=r"some \(some-dist 1.0\): rank must be at least 1"):
        resolve("some", {"rank": 0}).make()


def test_a_factory_that_lacks_an_option_is_an_option_error(site):
    module = site.add("some-dist", "some", fields=OPTIONS)
    site.module(f"{module}_factory", "class Made:\n    pass\n")
    with pytest.raises(commhub.HookOptionError, match=r"some \(some-dist 1.0\): .*no arguments") as caught:
        resolve("some").make()
    assert isinstance(caught.value.__cause__, TypeError)


def test_a_factory_that_fails_otherwise_is_a_plugin_error(site):
    module = site.add("some-dist", "some", fields=OPTIONS)
    site.module(f"{module}_factory", MADE)
    with pytest.raises(commhub.PluginError, match="RuntimeError: unlucky"):
        resolve("some", {"rank": 13}).make()


def test_errors_of_commhub_pass_through_a_factory(site):
    module = site.add("some-dist", "some", fields=OPTIONS)
    site.module(f"{module}_factory", MADE)
    with pytest.raises(commhub.UnknownHookError, match="inner"):
        resolve("some", {"rank": 14}).make()


@pytest.mark.parametrize("source", ["import no_such_module_at_all", "x = 1", "raise SystemExit", "Made = 3"])
def test_a_factory_that_cannot_be_had_is_a_plugin_error(site, source):
    module = site.add("some-dist", "some")
    site.module(f"{module}_factory", source)
    with pytest.raises(commhub.PluginError, match=r"some \(some-dist 1.0\): its factory"):
        resolve("some").load()


UNPRINTABLE = """
class E(RuntimeError):
    def __str__(self): raise ValueError("no text")
    __repr__ = __str__
class V(ValueError):
    __str__ = __repr__ = E.__str__
"""


@pytest.mark.parametrize(
    ("source", "error"),
    [
        ("raise E", commhub.PluginError),
        ("Made = E()", commhub.PluginError),
        ("def Made(): raise E", commhub.PluginError),
        ("def Made(): raise V", commhub.HookOptionError),
    ],
)
def test_a_factory_whose_errors_cannot_be_printed_is_an_error_of_commhub(site, source, error):
    module = site.add("some-dist", "some")
    site.module(f"{module}_factory", UNPRINTABLE + source)
    with pytest.raises(error, match=r"some \(some-dist 1.0\): .*raised ValueError"):
        resolve("some").make()
