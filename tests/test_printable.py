"""Text of anybody's making, made printable."""

import unicodedata

import pytest

from commhub._printable import described, message_of, shortened, shown, visible

SEEN = ["plain text", "für 10 €", "宽 字", "a\xa0b", "日\u3000本", "e\u0301", "👍"]


@pytest.mark.parametrize("text", SEEN)
def test_what_can_be_seen_stays(text):
    assert visible(text) == text


def test_no_control_format_or_invisible_character_stays():
    every = [chr(code) for code in range(0x110000)]
    bad = {x for x in every if unicodedata.category(x) in {"Cc", "Cf", "Cs", "Zl", "Zp"}} | {
        "\ufe0f",
        "\u3164",
        "\u115f",
    }
    text = "".join(sorted(bad))
    once = visible(text)
    assert once.isascii()
    assert visible(once) == once
    assert visible("\x1b\x9b\r\n\t\b\u202e\u200b\udc80\U000e0001") == r"\x1b\x9b\r\n\t\x08\u202e\u200b\udc80\U000e0001"
    assert visible("a\nb\tc\r", keep="\n\t") == "a\nb\tc\\r"


def test_an_error_of_any_making_is_described_on_its_lines():
    class Silent(Exception):
        def __str__(self):
            raise KeyboardInterrupt

    assert described(Silent()) == "Silent: (no message: its __str__ raised KeyboardInterrupt)"
    assert described(ValueError("a\nb\x1b")) == "ValueError: a\nb\\x1b"
    assert message_of(ValueError("x" * 10**6 + "end")).endswith("end")
    assert len(message_of(ValueError("x" * 10**6))) < 21_000


def test_a_value_of_any_making_is_shown():
    class Silent:
        def __repr__(self):
            raise SystemExit

    assert shown(Silent()) == "<Silent whose repr raised SystemExit>"
    assert shown({"a": 1}) == "{'a': 1}"


def test_of_a_long_text_both_ends_are_kept():
    assert shortened("abcdefgh", 4) == "ab [4 characters left out] gh"
    assert shortened("abcd", 4) == "abcd"
