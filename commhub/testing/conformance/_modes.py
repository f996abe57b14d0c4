"""What DDP can be asked for: unused parameters, accumulation, uneven inputs, subgroups."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from commhub.testing._compare import assert_equal_across_ranks, bitwise_equal, gathered

from ._check import NotApplicableError, rule
from ._material import (
    MANY,
    ONE,
    assert_mean,
    build,
    drawn,
    give,
    optimizer_of,
    promised_error,
    results,
    state_of,
)
from ._numbers import ALIKE

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from ._subject import Subject

LEFT_OUT = ("tall", "vector")
NEVER = "square"  # DDP warns where nothing is unused


@rule("ranks", after=(*ALIKE, "ranks_agree", "zeros_stay_zero"))
def unused_parameters(subject: Subject) -> None:
    """With find_unused_parameters, what no rank used gets no gradient, and what one rank used gets one everywhere."""
    rank = dist.get_rank()
    for cap in (ONE, MANY):
        model, _ = build(subject, cap, find_unused_parameters=True)
        for step in range(4):
            users = (range(dist.get_world_size()), (0,), ())[step % 3]
            own = {n: g for n, g in drawn(rank, step).items() if n != NEVER and (n not in LEFT_OUT or rank in users)}
            found = give(model, own)
            where = f"step {step}, used by {list(users)}"
            for name in (*LEFT_OUT, NEVER):
                wanted = bool(users) and name != NEVER
                assert (name in found) == wanted, f"{where}: {name} has {'a' if name in found else 'no'} gradient"
            assert all(g.isfinite().all() for g in found.values()), where
            if subject.promises("agrees") is not False:
                assert_equal_across_ranks({f"{where}: {name}": g for name, g in found.items()})


@rule("ranks", after=ALIKE)
def accumulation(subject: Subject) -> None:
    """Gradients accumulated under no_sync are averaged once, as if they had come at once."""
    rank = dist.get_rank()
    (model, registration), (twin, _) = build(subject, MANY), build(subject, MANY)
    for step in range(3):
        first, second = drawn(rank, 10 * step), drawn(rank, 10 * step + 1)
        model.zero_grad()
        with model.no_sync():
            model(first).backward()
            kept = results(model)
            assert all(bitwise_equal(kept[name], first[name]) for name in first), "no_sync changed a gradient"
        model(second).backward()
        whole = give(twin, {name: first[name] + second[name] for name in first})
        for name, found in results(model).items():
            assert bitwise_equal(found, whole[name]), f"step {step}: {name}"
        optimizer_of(model).step()
        assert registration.step == step + 1


@rule("ranks", after=(*ALIKE, "ranks_agree", "mean", "zeros_stay_zero", "unused_parameters"))
def uneven_inputs(subject: Subject) -> None:
    """Under join() ranks that have run out of inputs serve the others, which agree on the mean of what there is."""
    rank, p = dist.get_rank(), dist.get_world_size()
    try:
        bound = promised_error(subject, torch.float32)
    except NotApplicableError:
        bound = float("inf")
    for initial in (True, False):
        model, registration = build(subject, MANY)
        seen = []
        with model.join(divide_by_initial_world_size=initial):
            for step in range(2 + rank):
                seen.append(give(model, drawn(rank, step)))
        assert registration.step == p + 1
        everyone = gathered(seen)
        if subject.promises("agrees") is False:
            continue
        for step in range(p + 1):
            active = [r for r in range(p) if step < 2 + r]
            divisor = p if initial else len(active)
            for name, g in everyone[active[0]][step].items():
                where = f"step {step}: {name}, divided by {divisor},"
                assert_mean(g, [drawn(r, step)[name] for r in active], bound, where, divisor)
                for other in active[1:]:
                    assert bitwise_equal(g, everyone[other][step][name]), f"step {step}: {name} on rank {other}"


@rule("ranks", after=ALIKE)
def subgroups(subject: Subject) -> None:
    """A model on some of the ranks is averaged among those, also where that is one alone."""
    rank, p = dist.get_rank(), dist.get_world_size()
    halves = [list(range(p // 2)), list(range(p // 2, p))]
    groups = [dist.new_group(half) for half in halves]
    mine = 0 if rank in halves[0] else 1
    model, _ = build(subject, group=groups[mine])
    for step in range(2):
        found = give(model, drawn(rank, step))
    assert all(g.isfinite().all() for g in found.values())
    if subject.promises("agrees") is not False:
        assert_equal_across_ranks(found, groups[mine])


@rule("ranks", after=(*ALIKE, "non_finite_reaches_all", "non_finite_is_forgotten"))
def loss_scaler(subject: Subject) -> None:
    """A step that a loss scaler skips changes nothing that is remembered, and the scale leaves residuals alone."""
    rank = dist.get_rank()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    (model, registration), (unscaled, twin) = build(subject, scaler=scaler), build(subject)
    optimizer = optimizer_of(model)
    for step in range(5):
        optimizer.zero_grad()
        own = drawn(rank, step)
        if step < 2:
            give(unscaled, own)
        if step == 2:
            own = {name: g * float("inf") for name, g in own.items()}
            before = state_of(registration)
            _assert_like(before, state_of(twin))
        scaler.scale(model(own)).backward()
        if step == 2:
            for key, tensor in state_of(registration).items():
                assert bitwise_equal(tensor, before[key]), f"{key} has changed in a step that is skipped"
        scaler.step(optimizer)
        scaler.update()
    assert scaler.get_scale() == 512.0
    assert all(tensor.isfinite().all() for tensor in state_of(registration).values())


def _assert_like(scaled: Mapping[str, Tensor], unscaled: Mapping[str, Tensor]) -> None:
    """Raise unless residuals are what they are without a scale; what else is remembered may have it."""
    for key, tensor in unscaled.items():
        if key.partition(" of ")[0].endswith("residual"):
            off, size = float((scaled[key] - tensor).norm()), float(tensor.norm())
            assert off <= 0.1 * size + 1e-6, f"{key} is off by {off:.3g} of {size:.3g} when the loss is scaled"
