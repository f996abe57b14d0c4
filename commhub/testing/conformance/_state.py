"""What is remembered: saved, restored in new processes, with other buckets, through plain dicts."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from commhub.testing._compare import bitwise_equal

from ._check import NotApplicableError, rule
from ._material import MANY, ONE, build, couples, drawn, give, state_of
from ._numbers import ALIKE

if TYPE_CHECKING:
    from collections.abc import Sequence

    from commhub.testing._pool import RankPool

    from ._subject import Subject

Saved = tuple[bytes, dict[str, torch.Tensor]]
Resumed = tuple[dict[str, torch.Tensor], str | None]
"""What came of the step, and what was not restored."""


@rule("ranks", after=ALIKE)
def state_is_by_parameter(subject: Subject) -> None:
    """Its state says what it belongs to: the same entries, whatever the buckets."""
    entries = []
    for cap in (ONE, MANY):
        model, registration = build(subject, cap)
        for step in range(3):
            give(model, drawn(dist.get_rank(), step))
        entries.append({key: (tensor.shape, tensor.dtype) for key, tensor in state_of(registration).items()})
    if not entries[0] and not entries[1]:
        raise NotApplicableError("it remembers nothing")
    assert entries[0] == entries[1], f"in one bucket it keeps {sorted(entries[0])}, in many {sorted(entries[1])}"


def first_half(subject: Subject, cap: float) -> Saved:
    """Four steps, a checkpoint, and the step after it, on every rank."""
    model, registration = build(subject, cap)
    for step in range(4):
        give(model, drawn(dist.get_rank(), step))
    file = io.BytesIO()
    torch.save(registration.state_dict(), file)
    return file.getvalue(), give(model, drawn(dist.get_rank(), 4))


def second_half(subject: Subject, caps: Sequence[float], saved: list[Saved]) -> list[Resumed]:
    """The same step in a new process, from the checkpoint, once for each size of buckets."""
    return [_resumed(subject, cap, saved) for cap in caps]


def _resumed(subject: Subject, cap: float, saved: list[Saved]) -> Resumed:
    mine = torch.load(io.BytesIO(saved[dist.get_rank()][0]), weights_only=True)
    model, registration = build(subject, cap)
    for step in range(2):  # buckets are made, and what was before counts no more
        give(model, drawn(dist.get_rank(), 90 + step))
    registration.load_state_dict(mine)
    again = registration.state_dict()
    if again["step"] != mine["step"]:
        return {}, f"the step is {again['step']} and not {mine['step']}"
    for key, tensor in _flat(mine).items():
        if not bitwise_equal(tensor, _flat(again)[key]):
            return {}, f"{key} was not restored bit by bit"
    return give(model, drawn(dist.get_rank(), 4)), None


def _flat(saved: dict[str, Any]) -> dict[str, torch.Tensor]:
    scopes = {"shared": saved["shared"], **saved["local"]}
    return {
        f"{scope}: {key} of {name}": tensor
        for scope, tables in scopes.items()
        for name, table in tables.items()
        for key, tensor in table.items()
    }


@rule("processes", after=(*ALIKE, "rebuilt_buckets", "state_is_by_parameter"))
def resumes(subject: Subject, pool: RankPool, nproc: int) -> None:
    """A run goes on from its checkpoint in new processes, bit by bit, also with other buckets."""
    caps = (ONE,) if pool.run(couples, 1, (subject,), init=False)[0] else (ONE, MANY)
    before = pool.run(first_half, nproc, (subject, ONE))
    after = [_value(result) for result in pool.run_fresh(second_half, nproc, (subject, caps, before), timeout=60)]
    for place, cap in enumerate(caps):
        for rank, ((_, expected), resumed) in enumerate(zip(before, after, strict=True)):
            found, problem = resumed[place]
            where = f"rank {rank}, {'the same' if cap == ONE else 'other'} buckets"
            assert problem is None, f"{where}: {problem}"
            for name, tensor in expected.items():
                if nproc == 2 or cap == ONE:
                    assert bitwise_equal(found[name], tensor), f"{where}: the step after loading differs in {name}"
                else:  # more than two summands are added in another order
                    off = float((found[name] - tensor).norm())
                    bound = max(2e-2, 4 * float(subject.promises("tolerance") or 0.0))
                    assert off <= bound * float(tensor.norm()) + 1e-6, f"{where}: {name} is off by {off:.3g}"


def _value(result: Any) -> Any:
    assert result.error is None, f"{result.error.type_name}: {result.error.message}\n{result.error.traceback}"
    return result.value
