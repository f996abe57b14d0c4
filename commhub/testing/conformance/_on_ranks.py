"""Training on real ranks: many buckets, long runs, a peer that fails."""

from __future__ import annotations

import gc
import time
from collections import Counter
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import attrs
import torch
import torch.distributed as dist

from commhub.testing._compare import assert_equal_across_ranks, bitwise_equal
from commhub.testing._models import batches, mlp, train

from ._check import NotApplicableError, rule
from ._faulty import faulty
from ._material import (
    MANY,
    ONE,
    Given,
    Plain,
    assert_mean,
    build,
    couples,
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

    from ._subject import Subject

LAYERS = [12] * 13
PER_LAYER = 1 / 4096  # MiB: twelve buckets of LAYERS
LOOKS = 8
"""Steps in a row after which memory is looked at."""
SETTLES_WITHIN = 3.0
"""Seconds after the last step within which threads have let go of it."""


@rule("ranks", after=(*ALIKE, "ranks_agree", "mean"))
def many_buckets(subject: Subject) -> None:
    """Twelve buckets in flight for thirty steps: no hang, no mix-up, the mean, the same on all ranks."""
    model, registration = build(subject, PER_LAYER, mlp(LAYERS), lr=0.05)
    alone = mlp(LAYERS)
    draw = batches(LAYERS[0])
    for step in range(30):
        looked_at = step % 10 in (1, 9)
        alone.load_state_dict(model.module.state_dict())
        for module in (model, alone) if looked_at else (model,):
            module.zero_grad()
            module(*draw(dist.get_rank(), step)).square().mean().backward()
        if looked_at:
            _compare(subject, model, alone, f"step {step}")
        optimizer_of(model).step()
    assert registration.step == registration.stats.steps == 30
    assert all(p.isfinite().all() for p in model.parameters())


def _compare(subject: Subject, model: Any, alone: Any, where: str) -> None:
    found = {f"{where}: {name}": p.grad for name, p in model.module.named_parameters()}
    if subject.promises("agrees") is not False:
        assert_equal_across_ranks(found)
    try:
        bound = promised_error(subject, torch.float32)
    except NotApplicableError:
        return
    own = [p.grad for p in alone.parameters()]
    flat = torch.cat([g.reshape(-1) for g in own])
    every = [torch.empty_like(flat) for _ in range(dist.get_world_size())]
    dist.all_gather(every, flat)
    parts = zip(*(one.split([g.numel() for g in own]) for one in every), strict=True)
    for (name, got), ranks in zip(found.items(), parts, strict=True):
        assert_mean(got.reshape(-1), ranks, bound, name)


@rule("ranks", after=(*ALIKE, "many_buckets"))
def rebuilt_buckets(subject: Subject) -> None:
    """What it remembers belongs to parameters: buckets that DDP rebuilds after the first step change no result."""
    apart = couples(subject)
    rank = dist.get_rank()
    # More than two summands are added in another order there.
    rounding = max(1e-3, 4 * float(subject.promises("tolerance") or 0.0))
    (one, _), (many, _) = build(subject, ONE), build(subject, MANY)
    for step in range(4):
        own = drawn(rank, step)
        a, b = give(one, own), give(many, own)
        for name in a:
            assert b[name].isfinite().all(), f"step {step}: {name} is not finite"
            off = float((a[name] - b[name]).norm())
            bound = rounding * float(own[name].norm())
            assert apart or off <= bound, (
                f"step {step}: {name} is off by {off:.3g} where parameters have buckets of their own"
            )


@rule("ranks", after=ALIKE)
def trains(subject: Subject) -> None:
    """A small model learns with it: its loss falls to less than half."""
    if subject.promises("agrees") is False:
        raise NotApplicableError("it declares that ranks do not agree")
    model, _ = build(subject, PER_LAYER, mlp([8, 16, 16, 4]), lr=0.3)
    x = batches(8, rows=16)(dist.get_rank(), 0)
    run = train(model, 60, batch=lambda _rank, _step: x, optimizer=optimizer_of(model))
    assert run.losses[-1] < 0.5 * run.losses[0], f"the loss went from {run.losses[0]:.3g} to {run.losses[-1]:.3g}"


@rule("ranks", after=ALIKE)
def memory_is_flat(subject: Subject) -> None:
    """Two hundred steps need no more memory than sixty."""
    model, _ = build(subject, PER_LAYER, Given({"matrix": (48, 32), "vector": (9,)}))
    own = drawn(dist.get_rank(), 0, {"matrix": (48, 32), "vector": (9,)})
    held: dict[int, list[_Held]] = {60: [], 200: []}
    for step in range(1, 201):
        give(model, own)
        for end, looks in held.items():
            if end - LOOKS < step <= end:
                looks.append(_held())
    # The least of several looks: a thread of Gloo's may have yet to let go of the last step's payloads.
    before, after = held.values()
    tensors, objects = min(look.bytes for look in before), min(look.objects for look in before)
    patience = time.monotonic() + SETTLES_WITHIN
    while True:
        least, more_objects = min(after, key=lambda look: look.bytes), min(look.objects for look in after)
        are_flat = least.bytes <= tensors * 1.02 + 4096
        if are_flat and more_objects <= objects + 120:
            return
        if time.monotonic() > patience:
            break
        time.sleep(0.05)  # what is held for ever still is
        after.append(_held())
    assert are_flat, (
        f"tensors hold {tensors} bytes after 60 steps, {least.bytes} after 200, of which {least.more_than(before[-1])}"
    )
    raise AssertionError(f"there are {more_objects - objects} more objects after 140 more steps")


@attrs.frozen
class _Held:
    """What is alive: bytes of tensors' storages, by what they are, and the number of objects that are tracked."""

    storages: Counter[str]
    objects: int

    @property
    def bytes(self) -> int:
        return self.storages.total()

    def more_than(self, other: _Held) -> str:
        """What there is more of here than there, for people."""
        return ", ".join(f"{size} in {what}" for what, size in (self.storages - other.storages).most_common(4))


def _held() -> _Held:
    gc.collect()
    objects = gc.get_objects()
    tensors = {t.untyped_storage().data_ptr(): t for t in objects if type(t) is torch.Tensor}
    storages: Counter[str] = Counter()
    for t in tensors.values():
        storages[f"{str(t.dtype).removeprefix('torch.')}{list(t.shape)}"] += t.untyped_storage().nbytes()
    return _Held(storages, len(objects))


@rule("ranks", after=ALIKE)
def a_failing_peer(subject: Subject) -> None:
    """When it fails on one rank all ranks raise, saying which and why, and training goes on after a swap."""
    import commhub

    rank, last = dist.get_rank(), dist.get_world_size() - 1
    model, registration = build(subject, ONE)
    kind: Any = type(registration.hook)
    told = None
    with patch.object(kind, "reduce", faulty(kind.reduce, 2) if rank == last else kind.reduce):
        for step in range(3):
            assert told is None, f"failed early: {told}"
            try:
                give(model, drawn(rank, step))
            except commhub.HookError as error:
                told = error
    if rank == last or registration.stats.sent_bytes:  # who waits for nobody learns of nobody's failure
        assert told is not None, f"no error on rank {rank}"
        for part in (f"rank {last}", "ZeroDivisionError: planned"):
            assert part in str(told), f"{part!r} is missing from: {told}"
    for after in (Plain(), subject.hook):
        registration.swap(after)
        for step in range(2):
            give(model, drawn(rank, 50 + step))
        assert all(g.isfinite().all() for g in results(model).values()), f"after a swap to {after}"


@rule("ranks", after=ALIKE)
def swapped(subject: Subject) -> None:
    """Swapped in, out and in again between steps, it works as if it had always been there, bit by bit."""
    import commhub

    if subject.spec.needs:
        raise NotApplicableError(f"it needs {', '.join(subject.spec.needs)}, which is given at registration")
    rank = dist.get_rank()
    (model, registration), (twin, _), (plain, _) = (build(None, ONE) for _ in range(3))
    for one in (model, twin, plain):  # a first step, so that DDP rebuilds the buckets of all three
        give(one, drawn(rank, 0))
    for stay, other in enumerate((twin, plain)):  # the second time it finds what the first has left behind
        registration.swap(subject.hook)
        anew = commhub.register(other, subject.hook, timeout=30)
        # A registration counts its steps from 0, a swap goes on; a hook may do in each step something else.
        anew.load_state_dict({**anew.state_dict(), "step": registration.step})
        for step in range(3):
            own = drawn(rank, step)
            _assert_same_bits(give(model, own), give(other, own), "that of a model registered with it")
            _assert_same_bits(state_of(registration), state_of(anew), "that of a model registered with it")
        if stay == 0:
            assert registration.step == 4
            registration.swap(Plain())
            own = drawn(rank, 9)
            _assert_same_bits(give(model, own), give(plain, own), "the mean, after it was swapped out")


def _assert_same_bits(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor], whose: str) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert bitwise_equal(tensor, expected[name]), f"{name} differs from {whose}"
