"""What is kept from step to step, in the simulator: bounded, complete, and free of what is not finite."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ._check import NotApplicableError, rule
from ._material import SHAPES, by_name, drawn, simulate
from ._numbers import ALIKE, struck

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ._subject import Subject


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


@rule("simulated", after=(*ALIKE, "residuals_stay_bounded"))
def non_finite_is_forgotten(subject: Subject) -> None:
    """A step that is not finite leaves nothing behind: state stays finite, and the next step's result is."""
    for value in (float("inf"), float("nan")):
        outcome = simulate(subject, struck(value, 1), 3, steps=3)
        for rank, state in enumerate(outcome.states):
            for tables in (state.export("local"), state.export("shared")):
                for name, table in tables.items():
                    for key, tensor in table.items():
                        assert tensor.isfinite().all(), f"after {value} {key} of {name} is not finite on rank {rank}"
            if rank != 1 or subject.promises("agrees") is not False:
                for name, tensor in by_name(outcome, rank).items():
                    assert tensor.isfinite().all(), f"the step after {value} is not finite in {name}"
