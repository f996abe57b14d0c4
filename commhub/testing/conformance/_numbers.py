"""The numbers, in the simulator: one process, up to 64 virtual ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from commhub._formula import evaluate
from commhub.testing._compare import bitwise_equal
from commhub.testing.conformance._check import NotApplicableError, rule
from commhub.testing.conformance._material import (
    ROUNDING,
    SHAPES,
    assert_mean,
    by_name,
    drawn,
    promised_error,
    require_agreement,
    simulate,
)
from commhub.testing.conformance._static import LOADED

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from commhub.testing.conformance._subject import Subject

RUNS = (*LOADED, "runs")


@rule("simulated", after=LOADED)
def runs(subject: Subject) -> None:
    """A step on two ranks ends, and leaves tensors of the gradients' dtypes and shapes."""
    own = drawn(0, 0)
    found = by_name(simulate(subject, lambda _rank, _step: own, 2), 0)
    for name, gradient in own.items():
        assert (found[name].dtype, found[name].shape) == (gradient.dtype, gradient.shape), name
        assert found[name].isfinite().all(), f"{name} is not finite"


@rule("simulated", after=RUNS)
def asks_alike(subject: Subject) -> None:
    """Ranks with different values ask for the same collectives: kinds, shapes and dtypes depend on no local value."""

    def sparse_here(rank: int, step: int) -> dict[str, Tensor]:
        return {name: g * (torch.rand_like(g) < 0.1 * (rank + 1)) for name, g in drawn(rank, step).items()}

    for gradients in (drawn, sparse_here):
        simulate(subject, gradients, 3, steps=3)


ALIKE = (*RUNS, "asks_alike")


@rule("simulated", after=ALIKE)
def any_number_of_ranks(subject: Subject) -> None:
    """It works on 1 to 64 ranks, in one bucket and in many."""
    small = {"matrix": (24, 20), "vector": (7,), "scalar": ()}
    for p, buckets in ((1, 1), (3, 3), (8, 1), (64, 2)):
        outcome = simulate(subject, lambda rank, step: drawn(rank, step, small), p, steps=2, buckets=buckets)
        for tensor in outcome.gradients[p - 1]:
            assert tensor.isfinite().all(), f"on {p} ranks a result is not finite"


@rule("simulated", after=(*ALIKE, "any_number_of_ranks"))
def ranks_agree(subject: Subject) -> None:
    """The result is identical, bit by bit, on all ranks."""
    require_agreement(subject)
    for p in (2, 3, 8):
        outcome = simulate(subject, drawn, p, steps=3)
        for rank in range(1, p):
            for name, tensor in by_name(outcome, rank).items():
                assert bitwise_equal(tensor, by_name(outcome, 0)[name]), (
                    f"{name} on rank {rank} of {p} differs from rank 0"
                )


@rule("simulated", after=(*ALIKE, "any_number_of_ranks"))
def mean(subject: Subject) -> None:
    """Each step's result is the mean over the ranks, as closely as the spec promises."""
    bound = promised_error(subject, torch.float32)
    for p in (1, 2, 3, 8):
        for steps in (1, 3):
            found = by_name(simulate(subject, drawn, p, steps=steps), p - 1)
            for name in SHAPES:
                own = [drawn(rank, steps - 1)[name] for rank in range(p)]
                assert_mean(found[name], own, bound, f"{name} on {p} ranks, step {steps}")


def every_kind_of(rank: int, step: int) -> dict[str, Tensor]:
    """A gradient of every kind that a model may have."""
    base = {name: g.double() for name, g in drawn(rank, step, {"a": (24, 16), "b": (4, 6, 5, 3), "c": (9,)}).items()}
    return {
        "float64": base["a"],
        "bfloat16": base["a"].bfloat16(),
        "float16": base["a"].half(),
        "complex64": torch.complex(base["a"].float(), -base["a"].float()),
        "channels_last": base["b"].float().to(memory_format=torch.channels_last),
        "transposed": base["a"].float().t(),
        "empty": torch.zeros(0, 3),
        "one element": base["c"][:1].float(),
        "0-dim": base["c"][0].float(),
    }


@rule("simulated", after=RUNS)
def every_kind(subject: Subject) -> None:
    """Every kind of parameter keeps dtype, shape and strides: 0-dim, empty, 16-bit, double, complex, channels_last."""
    for p in (1, 2):
        outcome = simulate(subject, every_kind_of, p, steps=2)
        for rank in range(p):
            for (name, own), found in zip(every_kind_of(rank, 1).items(), outcome.gradients[rank], strict=True):
                assert (found.dtype, found.shape) == (own.dtype, own.shape), name
                assert found.isfinite().all(), f"{name} is not finite"


@rule("simulated", after=(*RUNS, "every_kind", "mean"))
def every_kind_has_its_mean(subject: Subject) -> None:
    """Every kind of parameter is averaged element by element, whatever its strides, as closely as its dtype allows."""
    promised_error(subject, torch.float32)
    found = dict(zip(every_kind_of(0, 0), simulate(subject, every_kind_of, 2).gradients[0], strict=True))
    for name, tensor in found.items():
        own = [every_kind_of(rank, 0)[name] for rank in range(2)]
        assert_mean(tensor, own, promised_error(subject, tensor.dtype), name)


def _residuals(subject: Subject, gradients: Mapping[int, Mapping[str, Tensor]], steps: int) -> list[dict[str, Tensor]]:
    """Per rank, what it still has to send of each parameter, by the parameter's place."""
    outcome = simulate(subject, lambda rank, _step: gradients[rank], len(gradients), steps=steps)
    tables = [state.export("local") for state in outcome.states]
    return [
        {name: table[key] for name, table in every.items() for key in table if key.endswith("residual")}
        for every in tables
    ]


def _shapes_with_residuals(subject: Subject) -> Mapping[str, tuple[int, ...]]:
    """Small parameters if it keeps residuals of them, because little of a large one is sent in a step."""
    for shapes in ({"matrix": (12, 8), "vector": (9,)}, SHAPES):
        if any(_residuals(subject, {rank: drawn(rank, 0, shapes) for rank in range(2)}, 1)):
            return shapes
    raise NotApplicableError("it keeps no residual")


@rule("simulated", after=ALIKE)
def residuals_stay_bounded(subject: Subject) -> None:
    """Residuals do not grow with the steps where ranks' gradients are opposite for ever."""
    base = drawn(0, 0, _shapes_with_residuals(subject))
    opposite = {0: base, 1: {name: -g for name, g in base.items()}}
    norms = []
    for steps in (60, 240):
        kept = _residuals(subject, opposite, steps)
        norms.append(max(float(tensor.norm()) for every in kept for tensor in every.values()))
    few, many = norms
    assert many <= max(2.0 * few, 1e-3), f"the largest residual is {few:.3g} after 60 steps, {many:.3g} after 240"


@rule("simulated", after=(*ALIKE, "residuals_stay_bounded"))
def feedback_sums_up(subject: Subject) -> None:
    """Nothing is lost: all results and the mean of what is still kept add up to all mean gradients."""
    steps, p = 10, 3
    shapes = _shapes_with_residuals(subject)
    own = {rank: drawn(rank, 7, shapes) for rank in range(p)}
    kept = _residuals(subject, own, steps)
    totals = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in shapes.items()}
    for count in range(1, steps + 1):
        outcome = simulate(subject, lambda rank, _step: own[rank], p, steps=count)
        for total, tensor in zip(totals.values(), outcome.gradients[0], strict=True):
            total += tensor.double()
    for place, (name, total) in enumerate(totals.items()):
        unsent = [every[str(place)].double() for every in kept if str(place) in every]
        whole = torch.stack([own[rank][name].double() for rank in range(p)]).mean(0) * steps
        missing = whole - total - (torch.stack(unsent).sum(0) / p if unsent else 0.0)
        lost, size = float(missing.norm()), float(whole.norm())
        assert lost <= 2e-3 * size + 1e-6, f"{name}: {lost:.3g} of {size:.3g} is lost"


FORMULA = {"rows": 256, "cols": 256}
"""The formula of sent bytes is compared for one float32 matrix of this shape."""


def _declared(subject: Subject, p: int) -> float:
    """The formula's value; of a hook inside, its own where the formula names ``inner``."""
    from commhub.testing.conformance._subject import Subject as Another

    values: dict[str, object] = {"p": p, "h": p, **FORMULA, "numel": FORMULA["rows"] * FORMULA["cols"], "itemsize": 4}
    for name, value in subject.options.items():
        option = subject.spec.option(name)
        nested = option is not None and option.type == "hook" and isinstance(value, str)
        values[name] = _declared(Another(value), p) if nested else value
    try:
        return evaluate(subject.spec.sent_bytes, values)
    except ValueError as error:
        raise AssertionError(f"sent_bytes cannot be evaluated: {error}") from error


def _measured(subject: Subject, p: int) -> float:
    shapes = {"matrix": tuple(FORMULA.values())}
    steps = 2
    both = [
        simulate(subject, lambda rank, step: drawn(rank, step, shapes), p, steps=count).sent_bytes[0]
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


@rule("simulated", after=(*ALIKE, "bytes_are_declared", "bytes_as_declared"))
def bytes_stay_bounded(subject: Subject) -> None:
    """What a rank sends does not grow with their number, unless the formula says so."""
    if _declared(subject, 64) > 1.3 * _declared(subject, 8):
        raise NotApplicableError("its formula says that it grows with the number of ranks")
    few, many = _measured(subject, 8), _measured(subject, 64)
    assert many <= 1.3 * few + 64, f"a rank sends {few:.0f} bytes among 8 and {many:.0f} among 64"


@rule("simulated", after=ALIKE)
def zeros_stay_zero(subject: Subject) -> None:
    """A parameter whose gradient has always been zero stays zero."""
    silent = ("tall", "vector", "scalar")

    def gradients(rank: int, step: int) -> dict[str, Tensor]:
        return {name: g * (name not in silent) for name, g in drawn(rank, step).items()}

    for buckets in (1, len(SHAPES)):
        found = by_name(simulate(subject, gradients, 2, steps=4, buckets=buckets), 1)
        for name in silent:
            assert not found[name].any(), f"{name} has become {found[name].abs().max():.3g}"


def _struck(value: float, step: int) -> Callable[[int, int], dict[str, Tensor]]:
    def gradients(rank: int, at: int) -> dict[str, Tensor]:
        made = drawn(rank, at)
        if at == step and rank == 1:
            for tensor in made.values():
                tensor.view(-1)[-1] = value
        return made

    return gradients


@rule("simulated", after=ALIKE)
def non_finite_reaches_all(subject: Subject) -> None:
    """A gradient that is not finite on one rank is not finite on any: a loss scaler decides alike everywhere."""
    require_agreement(subject)
    for value in (float("inf"), float("nan")):
        outcome = simulate(subject, _struck(value, 1), 3, steps=2)
        for rank in range(3):
            for name, tensor in by_name(outcome, rank).items():
                assert not tensor.isfinite().all(), f"{value} in {name} on rank 1 is finite on rank {rank}"


@rule("simulated", after=(*ALIKE, "residuals_stay_bounded"))
def non_finite_is_forgotten(subject: Subject) -> None:
    """A step that is not finite leaves nothing behind: state stays finite, and the next step's result is."""
    for value in (float("inf"), float("nan")):
        outcome = simulate(subject, _struck(value, 1), 3, steps=3)
        for rank, state in enumerate(outcome.states):
            for tables in (state.export("local"), state.export("shared")):
                for name, table in tables.items():
                    for key, tensor in table.items():
                        assert tensor.isfinite().all(), f"after {value} {key} of {name} is not finite on rank {rank}"
            if rank != 1 or subject.promises("agrees") is not False:
                for name, tensor in by_name(outcome, rank).items():
                    assert tensor.isfinite().all(), f"the step after {value} is not finite in {name}"


@rule("simulated", after=ALIKE)
def tiny_gradients(subject: Subject) -> None:
    """Gradients of 1e-12 and 1e-30 give finite results that are no larger."""
    for scale in (1e-12, 1e-30):

        def gradients(rank: int, step: int, scale: float = scale) -> dict[str, Tensor]:
            return {name: g * scale for name, g in drawn(rank, step).items()}

        for name, tensor in by_name(simulate(subject, gradients, 2, steps=3), 0).items():
            largest = float(tensor.abs().max())
            assert tensor.isfinite().all(), f"{name} of about {scale} is not finite"
            assert largest <= 100 * scale, f"{name} of about {scale} became {largest:.3g}"


@rule("simulated", after=(*ALIKE, "mean", "zeros_stay_zero"))
def huge_gradients(subject: Subject) -> None:
    """1e5 on one rank of two, whose mean fits 16 bits, gives that mean: the division comes before any cast."""
    bound = promised_error(subject, torch.float32)
    own = [{name: torch.full(shape, 1e5 * (rank == 0)) for name, shape in SHAPES.items()} for rank in range(2)]
    found = by_name(simulate(subject, lambda rank, _step: own[rank], 2), 0)
    for name, tensor in found.items():
        assert_mean(tensor, [one[name] for one in own], bound, name)


@rule("simulated", after=RUNS)
def random_generators(subject: Subject) -> None:
    """The global random generators are left alone: registering a hook changes no dropout mask."""
    import random

    torch.manual_seed(3)
    random.seed(3)
    before = torch.get_rng_state(), random.getstate()
    simulate(subject, drawn_apart, 2, steps=2)
    assert bitwise_equal(torch.get_rng_state(), before[0]), "it draws from torch's global generator: use one of its own"
    assert random.getstate() == before[1], "it draws from the random module's generator: use one of its own"


def drawn_apart(rank: int, step: int) -> dict[str, Tensor]:
    """``drawn``, under the name that shows that it uses generators of its own."""
    return drawn(rank, step)


@rule("simulated", after=(*ALIKE, "ranks_agree", "mean"))
def wire(subject: Subject) -> None:
    """``wire="bf16"`` works with it: the same dtypes, no more bytes, and an error of the wire's size at most."""
    plain = simulate(subject, drawn, 2)
    narrow = simulate(subject, drawn, 2, wire="bf16")
    assert narrow.sent_bytes[0] <= plain.sent_bytes[0], "more is sent with a narrower wire"
    for name in SHAPES:
        a, b = by_name(plain, 0)[name], by_name(narrow, 0)[name]
        assert a.dtype == b.dtype, name
        assert b.isfinite().all(), f"{name} is not finite"
        if subject.promises("exact") or subject.promises("tolerance") is not None:
            bound = 4 * ROUNDING[torch.bfloat16] * sum(float(drawn(r, 0)[name].norm()) for r in range(2))
            assert float((a - b).norm()) <= bound, f"{name} is off by {float((a - b).norm()):.3g}"
