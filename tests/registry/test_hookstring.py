"""Hook strings: what is written reads back as itself, and what cannot be read says where."""

import doctest
import random

import pytest

from commhub._errors import HookOptionError
from commhub.registry import _hookstring
from commhub.registry._hookstring import HookString, canonical_distribution, canonical_name, parse, split


def test_name_alone():
    assert parse("fp16") == HookString(name="fp16")


@pytest.mark.parametrize("text", ["Power-SGD", "power_sgd", " POWER_SGD ", "power_sgd()", "power-sgd( )"])
def test_case_dashes_and_blanks_do_not_matter(text):
    assert parse(text) == HookString(name="power_sgd")


def test_distribution_is_normalised():
    assert parse("Commhub_Power.SGD : powersgd").distribution == "commhub-power-sgd"


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("4", 4),
        ("-4", -4),
        ("0.5", 0.5),
        ("-1e-3", -1e-3),
        ("true", True),
        ("True", True),
        ("FALSE", False),
        ("none", None),
        ("None", None),
        ("bf16", "bf16"),
        ("Float16", "Float16"),
        ("post-local", "post-local"),
        ("'a, b=(c'", "a, b=(c"),
        ('"it\'s"', "it's"),
        (r"'a\'b'", "a'b"),
        ("'true'", "true"),
        ("[1, 2]", [1, 2]),
        ("(1, 'x')", (1, "x")),
        ("{4: 2, 8: -4}", {4: 2, 8: -4}),
        ("[]", []),
        ("powersgd( rank = 4 )", "powersgd(rank=4)"),
        ("POWER-SGD(rank=4, start=1)", "power_sgd(rank=4, start=1)"),
        ("some-dist:name", "some-dist:name"),
        ("a(b=c(d=[1, 2]))", "a(b=c(d=[1, 2]))"),
    ],
)
def test_values(written, value):
    read = parse(f"hook(x={written}, y = 1)").options
    assert read == {"x": value, "y": 1}
    assert type(read["x"]) is type(value)


def test_a_comma_after_the_last_option_is_allowed():
    assert parse("a(b=1,)") == parse("a(b=1)")


@pytest.mark.parametrize(
    ("text", "position", "what"),
    [
        ("", 0, "does not begin"),
        ("(a=1)", 0, "does not begin"),
        ("a b", 2, "cannot follow"),
        ("a(b=1", 1, "never closed"),
        ("a(b='x)", 4, "never closed"),
        ("a(b=[1)", 6, "closes nothing"),
        ("a(b=1))", 6, "follows the closing bracket"),
        ("a(b=1) c", 6, "follows the closing bracket"),
        ("a(b=1, b=2)", 7, "b is given twice"),
        ("a(1)", 2, "not of the form key=value"),
        ("a(, b=1)", 2, "not of the form key=value"),
        ("a(b=)", 4, "missing"),
        ("a(b=8bit)", 4, "put text in quotes"),
        ("a(b=1 2)", 4, "put text in quotes"),
        ("a(b={1, 2})", 4, "none of number"),
        ("a(b=b'x')", 4, "none of number"),
        ("a(b=1j)", 4, "none of number"),
        ("a(b=c(d=1, d=2))", 7, "d is given twice"),
    ],
)
def test_malformed_text_says_where_and_what(text, position, what):
    with pytest.raises(HookOptionError, match=rf"position {position}: .*{what}"):
        parse(text)


def test_deep_nesting_is_an_error_and_not_a_crash():
    with pytest.raises(HookOptionError, match="too deeply"):
        parse("a(b=" * 5000 + "1" + ")" * 5000)


def test_each_level_of_nesting_is_read_a_few_times_and_not_twice_as_often_as_the_one_around_it(monkeypatch):
    read, parse_one = [], _hookstring._parse
    monkeypatch.setattr(_hookstring, "_parse", lambda text, *head: read.append(text) or parse_one(text, *head))
    text = "a( b =" * 12 + "'x y'" + ")" * 12
    assert str(parse(text)) == "a(b=" * 12 + "'x y'" + ")" * 12
    assert len(read) < 60


def test_options_are_written_sorted_and_dicts_alike_however_they_were_built():
    one = HookString(name="a", options={"z": {2: 1, 1: 2}, "b": 1})
    other = HookString(name="a", options={"b": 1, "z": {1: 2, 2: 1}})
    assert str(one) == str(other) == "a(b=1, z={1: 2, 2: 1})"


@pytest.mark.parametrize("value", [float("nan"), b"x", {1, 2}, object(), [object()]])
def test_what_cannot_be_read_back_is_not_written(value):
    with pytest.raises(HookOptionError, match="cannot be written"):
        str(HookString(name="a", options={"b": value}))


def _value(rng, depth=2):
    text = "".join(rng.choice("aZ_09 .,:=()[]{}'\"\\-\n\té") for _ in range(rng.randrange(8)))
    words = ["true", "None", "bf16", "powersgd(rank=4)", "p(a='x, y')", "d:n", "1", "-1", "", "inf", "nan"]
    simple = [True, None, rng.randrange(-9, 9), rng.uniform(-1, 1) * 10.0 ** rng.randrange(-300, 300)]
    simple += [float("inf"), float("-inf"), text, rng.choice(words)]
    if depth and rng.random() < 0.4:
        items = [_value(rng, depth - 1) for _ in range(rng.randrange(3))]
        return rng.choice([items, tuple(items), {str(i): item for i, item in enumerate(items)}])
    return rng.choice(simple)


@pytest.mark.parametrize("seed", range(200))
def test_what_is_written_reads_back_as_itself(seed):
    rng = random.Random(seed)
    options = {f"k{i}": _value(rng) for i in range(rng.randrange(4))}
    made = HookString(name="Some-Hook", distribution=rng.choice([None, "Some_Dist"]), options=options)
    assert parse(str(made)) == made
    assert str(parse(str(made))) == str(made)
    assert split(f"{made}, {made}") == (str(made), str(made))


@pytest.mark.parametrize("seed", range(100))
def test_any_text_is_read_or_refused(seed):
    rng = random.Random(seed)
    for _ in range(50):
        text = "".join(rng.choice("ab(),='\"[]{}:-1 \\") for _ in range(rng.randrange(20)))
        try:
            read = parse(text)
        except HookOptionError:
            continue
        assert parse(str(read)) == read


def test_split_outside_brackets_and_quotes():
    text = " fp16, powersgd(rank=4, wire=bf16) ,a(b='x, y', c=[1, 2])"
    assert split(text) == ("fp16", "powersgd(rank=4, wire=bf16)", "a(b='x, y', c=[1, 2])")


def test_split_of_nothing_is_empty():
    assert split("  ") == ()


@pytest.mark.parametrize("text", ["a,,b", "a,", ",a"])
def test_split_refuses_an_empty_item(text):
    with pytest.raises(HookOptionError, match="empty"):
        split(text)


def test_split_refuses_a_bracket_that_closes_nothing():
    with pytest.raises(HookOptionError, match="closes nothing"):
        split("a, b)")


def test_split_refuses_an_open_bracket():
    with pytest.raises(HookOptionError, match="never closed"):
        split("a(b=1, c")


def test_the_examples_run():
    assert doctest.testmod(_hookstring).failed == 0
    assert doctest.testmod(_hookstring).attempted > 0


def test_canonical_spellings():
    assert canonical_name(" Power-SGD") == "power_sgd"
    assert canonical_distribution("Commhub_.Fp16") == "commhub-fp16"
