"""Specs are plain data, and a wrong one is refused where it is written."""

from enum import IntEnum, StrEnum

import pytest

from commhub import AveragerSpec, HookSpec, Option
from commhub.registry._spec import RESERVED


def spec(**fields):
    return HookSpec(**{"name": "mine", "summary": "Mine.", "factory": "mine.hook:Mine", **fields})


def test_name_summary_and_factory_suffice():
    made = spec()
    assert (made.kind, made.options, made.needs, made.exact, made.agrees) == ("hook", (), (), False, True)
    assert made.tolerance is None


def test_an_averager_has_the_shared_fields():
    made = AveragerSpec(name="often", summary="Often.", factory="mine:Often")
    assert (made.kind, made.options) == ("averager", ())


def test_a_spec_is_frozen_and_hashable():
    with pytest.raises(AttributeError):
        spec().name = "other"
    assert hash(spec()) == hash(spec())


def test_fields_are_given_by_name_only():
    with pytest.raises(TypeError):
        HookSpec("mine", "Mine.", "mine:Mine")
    with pytest.raises(TypeError):
        Option("rank", int)


@pytest.mark.parametrize("name", ["", "Mine", "my-hook", "1st", "_mine", "my hook", "é", 3, None])
def test_names_are_lowercase_snake_case(name):
    with pytest.raises(ValueError, match="not a name"):
        spec(name=name)


@pytest.mark.parametrize("factory", ["", "mine", "mine:", ":Mine", "mine.hook.Mine", "a:b:c", "a b:c", None])
def test_factories_are_text_of_the_form_module_colon_class(factory):
    with pytest.raises(ValueError, match="factory is"):
        spec(factory=factory)


@pytest.mark.parametrize("summary", ["", " ", "one\ntwo", None])
def test_summaries_are_one_line(summary):
    with pytest.raises(ValueError, match="summary is"):
        spec(summary=summary)


@pytest.mark.parametrize("tolerance", [-1, float("nan"), True, "1e-3"])
def test_tolerances_are_errors_of_at_least_zero(tolerance):
    with pytest.raises(ValueError, match="tolerance is"):
        spec(tolerance=tolerance)


@pytest.mark.parametrize("field", ["needs", "devices"])
@pytest.mark.parametrize("value", ["cpu", (1,), None])
def test_tuples_of_words_are_not_mistaken_for_words(field, value):
    with pytest.raises(TypeError, match="not a tuple of strings"):
        spec(**{field: value})


@pytest.mark.parametrize("name", RESERVED)
def test_reserved_option_names_are_refused(name):
    with pytest.raises(ValueError, match="reserved"):
        Option(name=name, type=str)


def test_keywords_are_refused_as_option_names():
    with pytest.raises(ValueError, match="keyword"):
        Option(name="lambda", type=float)


@pytest.mark.parametrize("kind", [list, "int", object, None])
def test_option_types_are_a_short_list(kind):
    with pytest.raises(ValueError, match="not an option's type"):
        Option(name="x", type=kind)


def test_a_default_must_have_the_type():
    with pytest.raises(ValueError, match="rank is '4', not an int"):
        Option(name="rank", type=int, default="4")


def test_a_default_must_be_among_the_choices():
    with pytest.raises(ValueError, match="none of 'a', 'b'"):
        Option(name="x", type=str, default="c", choices=("a", "b"))


def test_choices_must_have_the_type():
    with pytest.raises(ValueError, match="choice 3"):
        Option(name="x", type=str, choices=("a", 3))


def test_an_option_is_declared_once():
    with pytest.raises(ValueError, match="'rank' twice"):
        spec(options=(Option(name="rank", type=int), Option(name="rank", type=int)))


def test_a_preset_names_a_declared_option():
    with pytest.raises(ValueError, match="its preset has 'rank', which is none of its options"):
        spec(preset={"rank": 2})


def test_an_example_gives_declared_options_of_their_types_and_none_that_is_preset():
    rank = (Option(name="rank", type=int),)
    assert spec(options=rank, example={"rank": 2}).example == {"rank": 2}
    with pytest.raises(ValueError, match="its example has 'size', which is none of its options"):
        spec(options=rank, example={"size": 2})
    with pytest.raises(ValueError, match="wrong type in example"):
        spec(options=rank, example={"rank": "two"})
    with pytest.raises(ValueError, match="presets 'rank', which its example cannot give"):
        spec(options=rank, preset={"rank": 1}, example={"rank": 2})


def test_a_preset_has_the_options_type():
    with pytest.raises(ValueError, match="rank is 'two', not an int"):
        spec(options=(Option(name="rank", type=int),), preset={"rank": "two"})


def test_options_are_a_tuple_of_option():
    with pytest.raises(TypeError, match="tuple of commhub"):
        spec(options=("rank",))


@pytest.mark.parametrize(
    ("kind", "given", "value"),
    [
        (int, 3, 3),
        (float, 3, 3.0),
        (float, 0.5, 0.5),
        (bool, True, True),
        (str, "x", "x"),
        (dict, {4: 2}, {4: 2}),
        ("hook", "fp16", "fp16"),
    ],
)
def test_values_of_the_type_are_taken(kind, given, value):
    made = Option(name="x", type=kind).convert(given)
    assert made == value
    assert type(made) is type(value)


@pytest.mark.parametrize(
    ("kind", "given"),
    [
        (int, True),
        (int, 1.0),
        (int, "1"),
        (float, True),
        (float, "0.5"),
        (bool, 1),
        (bool, "true"),
        (str, 1),
        (dict, [(1, 2)]),
        ("hook", 1),
    ],
)
def test_values_of_another_type_are_refused(kind, given):
    with pytest.raises(ValueError, match="x is"):
        Option(name="x", type=kind).convert(given)


def test_none_is_allowed_only_where_it_is_the_default():
    assert Option(name="x", type=int).convert(None) is None
    with pytest.raises(ValueError, match="x is None"):
        Option(name="x", type=int, default=1).convert(None)


def test_subclasses_become_plain_values():
    word = StrEnum("Word", {"A": "a"}).A
    number = IntEnum("Number", {"ONE": 1}).ONE
    assert type(Option(name="x", type=str).convert(word)) is str
    assert type(Option(name="x", type=int).convert(number)) is int
    assert type(Option(name="x", type=float).convert(number)) is float


def test_a_mutable_default_is_not_shared_with_the_caller():
    option = Option(name="x", type=dict, default={1: 2})
    given = {3: 4}
    assert option.convert(given) is not given
