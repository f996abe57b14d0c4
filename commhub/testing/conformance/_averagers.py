"""Averagers: on their timetable, in place, alike on the ranks of the group."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from commhub.testing._compare import assert_equal_across_ranks, bitwise_equal
from commhub.testing._models import batches, mlp

from ._check import NotApplicableError, rule
from ._material import SHAPES, drawn, simulate
from ._static import LOADED

if TYPE_CHECKING:
    from ._subject import Subject

AVERAGER = ("averager",)
HORIZON = 1200
"""Steps within which something has to be due."""


def _due(subject: Subject, p: int = 2) -> list[int]:
    """The first steps that are due, as the averager itself says in the simulator."""
    averager: Any = simulate(subject, drawn, p).hooks[0]
    steps = [step for step in range(HORIZON) if averager.due(step) is not None]
    assert steps, f"nothing is due within {HORIZON} steps"
    return steps[:8]


@rule("simulated", kinds=AVERAGER, after=LOADED)
def has_a_timetable(subject: Subject) -> None:
    """It is due now and then, and says the same whenever it is asked, on every rank."""
    outcome = simulate(subject, drawn, 2)
    first = _due(subject)
    for hook in outcome.hooks:
        averager: Any = hook
        for step in reversed(range(first[-1] + 1)):
            due = averager.due(step)
            assert (due is not None) == (step in first), f"step {step} is {'' if due else 'not '}due when asked again"


TIMED = (*LOADED, "has_a_timetable")


@rule("simulated", kinds=AVERAGER, after=TIMED)
def sends_when_due(subject: Subject) -> None:
    """It sends in the steps that are due and in no others, and leaves the others' parameters alone."""
    due = _due(subject)

    def sent(steps: int) -> float:
        return simulate(subject, drawn, 2, steps=steps).sent_bytes[0] if steps else 0.0

    before = sent(due[0])
    assert not before, f"{before:.0f} bytes were sent before step {due[0]}, the first that is due"
    for step in (due[0], due[0] + 1):
        fresh = sent(step + 1) - before
        assert bool(fresh) == (step in due), f"step {step} sent {fresh:.0f} bytes"
        before += fresh


@rule("simulated", kinds=AVERAGER, after=TIMED)
def group_agrees(subject: Subject) -> None:
    """After an average the ranks of the group hold the same parameters, bit by bit."""
    step = _due(subject)[-1]
    outcome = simulate(subject, drawn, 2, steps=step + 1)
    averager: Any = outcome.hooks[0]
    if getattr(averager, "partial", False):
        raise NotApplicableError("an average leaves parameters out")
    ranks = averager.due(step).ranks
    for rank in ranks[1:]:
        for name, a, b in zip(SHAPES, outcome.gradients[ranks[0]], outcome.gradients[rank], strict=True):
            assert bitwise_equal(a, b), f"{name} on rank {rank} differs from rank {ranks[0]} after step {step}"


@rule("simulated", kinds=AVERAGER, after=TIMED)
def equal_parameters_stay(subject: Subject) -> None:
    """Where all ranks hold the same and nothing moves, an average keeps it, to rounding."""
    own = drawn(0, 0)
    step = _due(subject, 2)[0]
    found = simulate(subject, lambda _rank, _step: own, 2, steps=step + 1).gradients[0]
    for (name, tensor), after in zip(own.items(), found, strict=True):
        assert float((after - tensor).norm()) <= 1e-5 * float(tensor.norm()) + 1e-12, name


@rule("ranks", kinds=AVERAGER, after=TIMED)
def averages_in_place(subject: Subject) -> None:
    """Registered on a model it averages after the optimizer's steps, in place, and all ranks end with the same."""
    import commhub

    model = torch.nn.parallel.DistributedDataParallel(mlp())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    registration = commhub.register(model, subject.hook, optimizer=optimizer, timeout=30)
    kept = [(p, p.data_ptr(), p.stride()) for p in model.parameters()]
    for step in range(6):
        optimizer.zero_grad()
        model(*batches(8)(dist.get_rank(), step)).square().mean().backward()
        optimizer.step()
    registration.remove()
    for (p, pointer, stride), now in zip(kept, model.parameters(), strict=True):
        assert p is now, "a parameter was replaced"
        assert (p.data_ptr(), p.stride()) == (pointer, stride), "a parameter's memory was replaced"
        assert p.isfinite().all(), "a parameter is not finite"
    assert_equal_across_ranks({name: p.detach() for name, p in model.named_parameters()})
