"""What one rank does in a cell, and the story that it has to tell: it trains, is struck, hears of it, and trains on."""

from __future__ import annotations

import gc
import hashlib
import os
import resource
import threading
import time
from typing import TYPE_CHECKING

import attrs
import torch
import torch.distributed as dist

import commhub
from commhub._errors import described
from commhub.testing import current

from ._faults import FAULTS, SLEEPS
from ._here import LEARNING_RATE, PATIENT, Here, drawn
from ._phases import PHASES

if TYPE_CHECKING:
    from pathlib import Path

SETTLES = SLEEPS + 1.0
"""Seconds in which threads and connections that are given up have ended: Gloo wakes what it forgot at its timeout."""


@attrs.frozen
class Error:
    """What a rank raised; ``seconds`` after it came to the place, or after whatever held it there let it go."""

    kind: str
    text: str
    is_commhubs: bool
    seconds: float


@attrs.frozen
class Right:
    """Gradients after a step: how far they are from the mean that they should be, and a digest of their bytes."""

    error: float
    digest: str


@attrs.define(kw_only=True)
class Story:
    """What came of a cell on one rank.

    Attributes:
        error: what was raised where the fault struck, if anything.
        there: the gradients after that step, where nothing was raised.
        afterwards: those of some steps after a swap, or whatever was raised instead.
        before, after: how many descriptors and threads there were.
        left: the monotonic time when the function was left.
    """

    error: Error | None = None
    there: Right | None = None
    afterwards: list[Right] | str = ""
    before: tuple[int, int] = (0, 0)
    after: tuple[int, int] = (0, 0)
    left: float = 0.0


_kept: list[Here] = []  # as a script's globals are: only the interpreter's end lets go of them


def live(fault: str, phase: str, victim: int, folder: Path) -> Story:
    """Be a rank of a cell."""
    me = current()
    here = Here(rank=me.rank, size=me.world_size, victim=victim, fault=FAULTS[fault], place=phase, folder=folder)
    story = Story()
    here.join()
    PHASES[phase].set_up(here)
    story.before = held()
    here.meet("set up")
    here.arm(PHASES[phase].launch)
    if phase == "exit":
        _kept.append(here)
        PHASES[phase].act(here)
        story.left = time.monotonic()
        return story
    story.error = struck(here, phase)
    if story.error is None:
        story.there = (right if here.optimizer is None else right_parameters)(here, range(here.size))
    after_all_have_ended(here, phase)
    try:
        story.afterwards = train_on(here, phase)
    except Exception as error:
        story.afterwards = f"{type(error).__name__}: {error}"
    story.after = held(story.before)
    here.ended("the end")
    return story


def struck(here: Here, phase: str) -> Error | None:
    """Act; what was raised."""
    began = time.monotonic()
    try:
        PHASES[phase].act(here)
    except BaseException as error:
        detained = here.over is not None and (PHASES[phase].detains or here.fault.stops)
        seconds = time.monotonic() - (here.over if detained else began)
        is_commhubs = isinstance(error, commhub.CommhubError)
        return Error(type(error).__name__, str(error) if is_commhubs else described(error), is_commhubs, seconds)
    return None


def after_all_have_ended(here: Here, phase: str) -> None:
    """Let who is stuck or stopped go on when all others have ended, and be sure that whatever struck is over."""
    detained = here.fault.stops or (here.fault is FAULTS["stuck"] and PHASES[phase].detains)
    here.ended("ended", absent=detained and not here.is_victim)
    current().store.set("all have ended", "")
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    strikes = here.fault.strike is not None and not (here.fault.symmetric and PHASES[phase].detains)
    if here.is_victim and strikes:
        assert here.went_on.wait(30), "the fault did not strike"


def train_on(here: Here, phase: str) -> list[Right]:
    """Swap, or begin anew where the group is incomplete or has no store any more; then train."""
    ranks = list(range(here.size))
    if here.fault.kills or here.fault.ends_the_store:
        ranks = [rank for rank in ranks if not (here.fault.kills and rank == here.victim)]
        begin_anew(here, ranks)
    else:
        here.meet("swap")
        session = commhub.registration(here.model)._session
        session.target = attrs.evolve(session.target, timeout=PATIENT)
        commhub.registration(here.model).swap("allreduce")
    found = []
    for step in range(10, 13):
        here.backward(step)
        found.append(right(here, ranks))
    return found


def begin_anew(here: Here, ranks: list[int]) -> None:
    """Another group of those who are left, and all that belongs to it."""
    former = commhub.registration(here.model)
    former.close()
    here.model = here.registration = here.optimizer = former = None
    here.communicators.clear()
    gc.collect()
    dist.destroy_process_group()
    store = current().connect("anew")
    dist.init_process_group("gloo", store=store, rank=ranks.index(here.rank), world_size=len(ranks))
    here.build()
    here.registration = commhub.register(here.model, "allreduce", timeout=PATIENT)


def right(here: Here, ranks: range | list[int]) -> Right:
    """What came of the last step, beside what the mean over these ranks makes of it."""
    every = torch.stack([torch.stack(drawn(rank, here.last)) for rank in ranks]).double()
    return compare(here.gradients(), every.mean(0))


def right_parameters(here: Here, ranks: range | list[int]) -> Right:
    """The same of parameters that an averager has averaged, from the first step on."""
    drawn_ = [[torch.stack(drawn(rank, step)) for rank in ranks] for step in range(here.last + 1)]
    moved = -LEARNING_RATE * sum(torch.stack(every).double().mean(0) for every in drawn_)
    return compare([weight.detach() for weight in here.model.module.weights], moved)


def compare(found: list[torch.Tensor], expected: torch.Tensor) -> Right:
    error = float((torch.stack(found).double() - expected).abs().max())
    return Right(error, hashlib.sha256(b"".join(one.numpy().tobytes() for one in found)).hexdigest())


def held(before: tuple[int, int] | None = None) -> tuple[int, int]:
    """How many descriptors and threads this process has, as soon as they are no more than before."""
    end = time.monotonic() + SETTLES
    while True:
        gc.collect()
        found = len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))
        if before is None or all(a <= b for a, b in zip(found, before, strict=True)) or time.monotonic() > end:
            return found
        time.sleep(0.1)


def names() -> list[str]:
    """Python's threads, for whoever looks into a cell."""
    return sorted(thread.name for thread in threading.enumerate())
