"""The numbers, in the simulator: one process, up to 64 virtual ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING
from unittest.mock import patch

import torch
from torch import Tensor

from commhub._errors import HookOptionError
from commhub.drivers import _simulator
from commhub.testing._compare import bitwise_equal

from ._check import NotApplicableError, rule
from ._material import (
    ROUNDING,
    SHAPES,
    assert_mean,
    by_name,
    drawn,
    promised_error,
    require_agreement,
    simulate,
)
from ._static import LOADED

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from ._subject import Subject


@rule("simulated", after=LOADED)
def runs(subject: Subject) -> None:
    """A step on two ranks ends, and leaves tensors of the gradients' dtypes and shapes."""
    own = drawn(0, 0)
    with in_place():
        found = by_name(simulate(subject, lambda _rank, _step: own, 2), 0)
    for name, gradient in own.items():
        assert (found[name].dtype, found[name].shape) == (gradient.dtype, gradient.shape), name
        assert found[name].isfinite().all(), f"{name} is not finite"


def in_place() -> AbstractContextManager[object]:
    """Inside, an all-reduce leaves its result in the payload, as drivers may; elsewhere payloads are spoiled."""
    return patch.object(_simulator, "APART", new=False)


@rule("simulated", after=(*LOADED, "runs"))
def takes_results(subject: Subject) -> None:
    """It takes results from what its yields return: what was yielded is the driver's, and undefined afterwards."""
    with in_place():
        expected = by_name(simulate(subject, drawn, 2, steps=3), 0)
    for name, tensor in by_name(simulate(subject, drawn, 2, steps=3), 0).items():
        assert bitwise_equal(tensor, expected[name]), (
            f"{name} is another one where results are in memory of their own. Use what a yield returns, "
            "never what was yielded: bucket.flat.copy_((yield AllReduce(bucket.flat)))"
        )


RUNS = (*LOADED, "runs", "takes_results")


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


def struck(value: float, step: int) -> Callable[[int, int], dict[str, Tensor]]:
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
        outcome = simulate(subject, struck(value, 1), 3, steps=2)
        for rank in range(3):
            for name, tensor in by_name(outcome, rank).items():
                assert not tensor.isfinite().all(), f"{value} in {name} on rank 1 is finite on rank {rank}"


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
    """``wire="bf16"`` works with it: the same dtypes, no more bytes, and an error of the wire's size at most.

    A hook whose own dtype all payloads have may refuse it.
    """
    plain = simulate(subject, drawn, 2)
    try:
        narrow = simulate(subject, drawn, 2, wire="bf16")
    except HookOptionError as refusal:
        if "wire=" not in str(refusal):  # it fails for another reason
            raise
        raise NotApplicableError(f"it refuses wire=: {refusal}") from None
    assert narrow.sent_bytes[0] <= plain.sent_bytes[0], "more is sent with a narrower wire"
    for name in SHAPES:
        a, b = by_name(plain, 0)[name], by_name(narrow, 0)[name]
        assert a.dtype == b.dtype, name
        assert b.isfinite().all(), f"{name} is not finite"
        if subject.promises("exact") or subject.promises("tolerance") is not None:
            bound = 4 * ROUNDING[torch.bfloat16] * sum(float(drawn(r, 0)[name].norm()) for r in range(2))
            assert float((a - b).norm()) <= bound, f"{name} is off by {float((a - b).norm()):.3g}"
