"""Recipes: what a user wrote, made into a hook. Read once, written as it was named, compared without surgery."""

import subprocess
import sys

import pytest
import torch

import commhub
from commhub.protocol._wire import short_dtype, wire_dtype
from commhub.registry import _hookstring
from commhub.registry._recipe import Recipe, choose, resolve
from commhub.registry._spec import RESERVED

FIELDS = "options=(Option(name='rank', type=int, default=1), Option(name='inner', type='hook', default='other'))"


class Halves:
    """A hook whose class has capitals."""

    def reduce(self, bucket):
        yield from ()


class _Private(Halves):
    """A name with which no hook string may begin."""


@pytest.fixture
def read(monkeypatch):
    """The hook strings that are taken apart while the test runs."""
    read, one = [], _hookstring._parse
    monkeypatch.setattr(_hookstring, "_parse", lambda text, *head: read.append(text) or one(text, *head))
    return read


def test_a_hook_string_is_read_once_on_the_way_to_its_recipe_and_to_text_again(site, read):
    site.add("some-dist", "some", fields=FIELDS)
    recipe = choose("some_dist:SOME(rank=4, timeout=3)", {"optimizer": ()})
    assert (str(recipe), recipe.name, recipe.label) == ("some(rank=4)", "some", "some (some-dist 1.0)")
    assert recipe.wrote("some(rank=4)")
    assert read == ["some_dist:SOME(rank=4, timeout=3)"]


def test_arguments_of_register_are_kept_apart_as_they_were_given_and_the_wire_as_text(site):
    site.add("some-dist", "some", fields=FIELDS)
    recipe = choose("some(wire=float16, timeout=3)", {"optimizer": ()})
    assert dict(recipe.reserved) == {"optimizer": (), "timeout": 3, "wire": "float16"}
    assert dict(recipe.given) == {}
    assert (recipe.wire, str(recipe)) == ("fp16", "some(wire=fp16)")
    assert (choose("some", {}).wire, choose("some(wire=None)", {}).wire) == (None, None)


@pytest.mark.parametrize(
    ("wire", "text"),
    [
        (torch.float16, "fp16"),
        (torch.bfloat16, "bf16"),
        (torch.float32, "fp32"),
        (torch.float64, "float64"),
        ("Torch.Half", "fp16"),
        ("BFLOAT16", "bf16"),
        ("bogus", "bogus"),
    ],
)
def test_a_wire_is_written_by_its_shortest_name_and_stands_among_the_options_in_order(site, wire, text):
    site.add("some-dist", "some", fields=FIELDS.replace("inner", "z"))
    assert str(choose("some", {"wire": wire, "rank": 2, "z": "a"})) == f"some(rank=2, wire={text}, z=a)"
    assert str(choose(Halves(), {"wire": wire})) == f"Halves(wire={text})"
    if isinstance(wire, torch.dtype):
        assert short_dtype(wire) == text
    elif text != "bogus":
        assert wire_dtype(wire) == wire_dtype(text)


def test_a_hook_object_is_named_by_its_class_as_it_is_and_made_once():
    hook = Halves()
    recipe = choose(hook, {"wire": "bf16"})
    assert (recipe.name, recipe.label, str(recipe)) == ("Halves", "Halves", "Halves(wire=bf16)")
    assert recipe.make() is recipe.make() is recipe.load()() is hook
    assert (recipe.kind, recipe.needs, recipe.devices, recipe.nested) == ("hook", (), ("cpu", "cuda"), ())
    assert recipe.packages() == {}
    assert recipe == choose(hook, {"wire": "bf16"}) != choose(Halves(), {"wire": "bf16"})
    assert str(choose(_Private(), {})) == "_Private"


def test_what_create_made_is_named_by_its_name():
    recipe = choose(commhub.create("PowerSGD", rank=3), {})
    assert (str(recipe), recipe.distribution, recipe.options["rank"]) == ("powersgd", "", 3)


@pytest.mark.parametrize("text", ["Halves", "Halves()", "Halves(wire=bf16)", "some-dist:Halves(wire=fp16)"])
def test_a_hook_object_wrote_its_own_text_whatever_the_wire(text):
    assert choose(Halves(), {}).wrote(text)
    assert choose(Halves(), {"wire": "bf16"}).wrote(text)
    assert not choose(_Private(), {}).wrote(text)
    assert choose(_Private(), {}).wrote(text.replace("Halves", "_Private"))


@pytest.mark.parametrize("text", ["halves", "Half", "Halves(rank=1)", "Halves:x", ""])
def test_a_text_of_another_name_case_or_options_is_not_the_recipes(text):
    assert not choose(Halves(), {}).wrote(text)


@pytest.mark.parametrize("text", ["Halves(", "Halves(rank)", "Halves(wire=1, wire=2)", "Halves(" * 5000])
def test_a_text_that_cannot_be_read_is_an_error_and_not_another_hooks(text):
    with pytest.raises(commhub.HookOptionError, match="hook string"):
        choose(Halves(), {}).wrote(text)


def test_a_recipe_wrote_texts_of_its_options_in_any_order_and_no_others(site):
    site.add("a-dist", "same", fields=FIELDS)
    site.add("b-dist", "same", fields=FIELDS)
    recipe = choose("b-dist:same(rank=2, inner='x(y=1)')", {"wire": "bf16"})
    assert str(recipe) == "b-dist:same(inner=x(y=1), rank=2, wire=bf16)"
    for text in (
        "same(rank=2, inner=x(y=1))",
        "a-dist:same(inner=x(y=1), rank=2)",
        "same(rank=2, wire=fp16, inner=x(y=1))",
    ):
        assert recipe.wrote(text), text
    for text in ("same", "same(rank=2)", "same(rank=3, inner=x(y=1))", "same(rank=2.0, inner=x(y=1))"):
        assert not recipe.wrote(text), text


def test_what_is_given_twice_is_refused_alike_however_the_recipe_is_asked_for(site):
    site.add("some-dist", "some", fields=FIELDS)
    said = "some(rank=4, wire=bf16): 'rank' is given in the hook string and as an argument. Give it once."
    for ask in (choose, resolve):
        with pytest.raises(commhub.HookOptionError) as caught:
            ask("some(rank=4, wire=bf16)", {"wire": "fp16", "rank": 4})
        assert str(caught.value) == said


def test_only_the_reserved_names_that_are_asked_for_may_stand_in_a_hook_string(site):
    site.add("some-dist", "some", fields=FIELDS)
    assert resolve("some(wire=bf16)", reserved=("wire",)).wire == "bf16"
    for text, reserved in (("some(wire=bf16)", ()), ("some(timeout=3)", ("wire",))):
        with pytest.raises(commhub.HookOptionError, match=r"some-dist 1\.0\): .* is an argument of commhub\.register"):
            resolve(text, reserved=reserved)
    taken = set(RESERVED) - {"state"}
    assert choose("some", dict.fromkeys(taken, 1)).reserved.keys() == taken


def test_a_recipe_changes_only_into_another_one(site):
    import attrs

    site.add("some-dist", "some", fields=FIELDS)
    recipe = choose("some(wire=bf16)", {})
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        recipe.name = "other"
    for mapping in (recipe.given, recipe.options, recipe.reserved, choose(Halves(), {"wire": "bf16"}).reserved):
        with pytest.raises(TypeError):
            mapping["rank"] = 2
    assert len({recipe, choose("some(wire=bf16)", {}), choose("some(wire=fp16)", {})}) == 2
    assert str(attrs.evolve(recipe, given={"rank": 2})) == "some(rank=2, wire=bf16)"
    assert str(Recipe(name="None", instance=Halves())) == "None"


def test_a_hook_is_chosen_written_and_compared_without_torch():
    code = (
        "import sys\nfrom commhub.registry._recipe import choose\n"
        "recipe = choose('powersgd(rank=2, wire=BF16)', {})\n"
        "assert str(recipe) == 'powersgd(rank=2, wire=bf16)' and recipe.wrote('powersgd(rank=2)')\n"
        "sys.exit('torch is loaded' if 'torch' in sys.modules else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
