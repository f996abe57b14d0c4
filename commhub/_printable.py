r"""Text of anybody's making, made fit to be shown: in an error, on a terminal, in a log.

What moves the cursor, recolours the screen, reorders a line or cannot be seen is written as Python would write
it (``\x1b``), so that a reader sees that it is there. This module imports nothing.
"""

__all__ = ["described", "message_of", "shortened", "shown", "type_name", "visible"]

_LONGEST = 20_000
"""Characters of an error's text that are kept; of a longer one the middle is left out."""
_BLANK_LETTERS = frozenset(
    (
        *(0x034F, 0x115F, 0x1160, 0x17B4, 0x17B5, 0x2800, 0x3164, 0xFFA0),
        *range(0x180B, 0x1810),
        *range(0xFE00, 0xFE10),
        *range(0xE0100, 0xE01F0),
    )
)
"""Characters that Python calls printable, and that no terminal shows: fillers, joiners and variation selectors."""


def visible(text: str, keep: str = "") -> str:
    """The text with each character that is no visible one escaped, those in ``keep`` and blanks excepted.

    Doing it twice changes nothing.
    """
    text = str.__str__(text)
    if text.isascii() and text.isprintable():
        return text
    return "".join(x if x in keep or _is_visible(x) else _escaped(x) for x in text)


def _is_visible(character: str) -> bool:
    if character.isprintable():
        return ord(character) not in _BLANK_LETTERS
    return character.isspace() and character >= "\xa0" and character not in "\u2028\u2029"  # wide and narrow blanks


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode()


def message_of(error: BaseException) -> str:
    """The error's message as text that can be sent and printed, whatever the error is and however long."""
    try:
        text = str.__str__(str(error))
    except BaseException as worse:  # noqa: BLE001 - an error may be of anybody's making
        return f"(no message: its __str__ raised {type_name(worse)})"
    return visible(shortened(text), keep="\n\t")


def described(error: BaseException) -> str:
    """Its type and message as text that can be sent and printed, whatever the error is."""
    return f"{type_name(error)}: {message_of(error)}"


def shown(value: object, longest: int = _LONGEST) -> str:
    """The value's ``repr`` as text that can be printed, or its type where it has none."""
    try:
        return visible(shortened(str.__str__(repr(value)), longest), keep="\n\t")
    except BaseException as worse:  # noqa: BLE001 - a value may be of anybody's making
        return f"<{type_name(value)} whose repr raised {type_name(worse)}>"


def shortened(text: str, longest: int = _LONGEST) -> str:
    """The text, its middle left out where it has more than ``longest`` characters."""
    if len(text) <= longest:
        return text
    half = longest // 2
    return f"{text[:half]} [{len(text) - 2 * half} characters left out] {text[-half:]}"


def type_name(value: object) -> str:
    """The name of its class, printable."""
    # Not ``__name__`` of the class: a metaclass may answer that with anything.
    name: str = type.__dict__["__name__"].__get__(type(value))
    return visible(shortened(name, 200))
