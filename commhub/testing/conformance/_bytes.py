"""What is sent, in the simulator: as much as the spec says, and no more with more ranks."""

from __future__ import annotations

from commhub.registry._formula import evaluate

from ._check import NotApplicableError, rule
from ._material import drawn, simulate
from ._numbers import ALIKE
from ._subject import Subject

FORMULA = {"rows": 256, "cols": 256}
"""The formula of sent bytes is compared for one float32 matrix of this shape."""


def _declared(subject: Subject, p: int) -> float:
    """The formula's value; of a hook inside, its own where the formula names ``inner``."""
    values: dict[str, object] = {"p": p, "h": p, **FORMULA, "numel": FORMULA["rows"] * FORMULA["cols"], "itemsize": 4}
    for name, value in subject.options.items():
        option = subject.spec.option(name)
        nested = option is not None and option.type == "hook" and isinstance(value, str)
        values[name] = _declared(Subject(value), p) if nested else value
    try:
        return evaluate(subject.spec.sent_bytes, values)
    except ValueError as error:
        raise AssertionError(f"sent_bytes cannot be evaluated: {error}") from error


def _measured(subject: Subject, p: int, steps: int = 2) -> float:
    """The mean of as many steps, after as many others."""
    # Two ranks' gradients serve all: drawing 64 takes longer than averaging them.
    own = [drawn(rank, 0, {"matrix": tuple(FORMULA.values())}) for rank in range(2)]
    both = [
        simulate(subject, lambda rank, _step: own[rank % 2], p, steps=count).sent_bytes[0]
        for count in (steps, 2 * steps)
    ]
    return (both[1] - both[0]) / steps


@rule("simulated", after=(*ALIKE, "bytes_are_declared"))
def bytes_as_declared(subject: Subject) -> None:
    """It sends what its formula says, for one 256 x 256 float32 matrix, within 2 %."""
    for p in (2, 4, 8):
        said, sent = _declared(subject, p), _measured(subject, p)
        off = abs(sent - said)
        assert off <= 0.02 * said + 64, f"on {p} ranks a step sends {sent:.0f} bytes; the formula gives {said:.0f}"


@rule("simulated", after=(*ALIKE, "any_number_of_ranks", "bytes_are_declared", "bytes_as_declared"))
def bytes_stay_bounded(subject: Subject) -> None:
    """What a rank sends does not grow with their number, unless the formula says so."""
    if _declared(subject, 64) > 1.3 * _declared(subject, 8):
        raise NotApplicableError("its formula says that it grows with the number of ranks")
    few, many = (_measured(subject, p, steps=1) for p in (8, 64))
    assert many <= 1.3 * few + 64, f"a rank sends {few:.0f} bytes among 8 and {many:.0f} among 64"
