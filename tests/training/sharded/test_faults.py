"""A rank that is killed, stopped, interrupted or raises, in each call that takes all ranks of a mesh and in a step.

Every other rank is told in bounded time, the former checkpoint or the new one loads as a whole, and those who are left
go on together.
"""

import contextlib
import os
import re
import signal
import threading
import time
from datetime import timedelta
from unittest.mock import patch

import attrs
import pytest
import torch
import torch.distributed as dist

import commhub
from commhub import AllReduce
from commhub.registry._recipe import Recipe
from commhub.testing import current
from commhub.training import _loading, _start
from commhub.training._elsewhere import Elsewhere
from commhub.training.attachments._fsdp import Unit
from commhub.training.rendezvous._rendezvous import Rendezvous
from commhub.training.saving import _phases
from commhub.training.saving._folder import Folder

from .sharding import EVERY, Loop, gradients, loss_of, mesh, same, sharded

TIMEOUT = 3.0
GROUPS = 8.0
"""Seconds that FSDP's own collectives take at most, which no registration bounds."""
PATIENT = 40.0
HOOK = "powersgd(rank=2, start_step=0)"


class Strikes:
    """The plain mean, and one entry in its state; it is struck as it is prepared and in the second bucket."""

    def __init__(self, at):
        self.at = at

    def prepare(self, setup):
        self.at("prepare")

    def reduce(self, bucket):
        if bucket.index == 1:
            self.at("encode")
        mean = yield AllReduce(bucket.flat)
        if bucket.index == 1:
            self.at("decode")
        bucket.flat.copy_(mean)


def killed():
    os.kill(os.getpid(), signal.SIGKILL)


def stopped():
    """All threads stop at once, and go on when all others have ended."""
    os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(0.01)  # the signal may find another thread first


def interrupted():
    raise KeyboardInterrupt


def raises():
    raise OSError("planned")


FAULTS = {"killed": killed, "stopped": stopped, "interrupted": interrupted, "raises": raises}
PLACES = {
    "register": ("choose", "prepare", "elsewhere"),
    "swap": ("choose", "prepare", "elsewhere"),
    "save": ("elsewhere", "make", "write", "switch"),
    "load": ("read", "fit", "restore"),
    "schedule": ("choose",),
    "step": ("encode", "decode", "shards", "told"),
}


@attrs.define
class Victim:
    """Strikes once, on one rank, in one place."""

    fault: str
    place: str
    rank: int
    armed: bool = False
    over: float | None = None
    went_on: threading.Event = attrs.Factory(threading.Event)

    @property
    def is_here(self):
        return dist.get_rank() == self.rank

    def at(self, place):
        if not (self.armed and self.is_here and place == self.place):
            return
        self.armed = False
        try:
            FAULTS[self.fault]()
        finally:
            self.over = time.monotonic()
            self.went_on.set()

    def before(self, stack, owner, name, place, when=lambda *_: True):
        """Strike ahead of a function."""
        function = getattr(owner, name)
        is_method = isinstance(owner.__dict__.get(name), classmethod)

        def struck(*args, **options):
            if when(*args):
                self.at(place)
            return function(*args, **options)

        stack.enter_context(patch.object(owner, name, staticmethod(struck) if is_method else struck))


def places(victim, stack, others):
    """Have every place struck that is the core's own."""
    victim.before(stack, Recipe, "make", "choose")
    victim.before(stack, Rendezvous, "of", "elsewhere", lambda group, *_: group is others)
    victim.before(stack, _start, "among", "elsewhere")
    victim.before(stack, _phases, "among", "elsewhere")
    for name in ("make", "write", "switch", "read"):
        victim.before(stack, Folder, name, name)
    victim.before(stack, _loading, "fit", "fit")
    victim.before(stack, _loading, "restore", "restore")
    victim.before(stack, Unit, "takes_part", "shards")
    victim.before(stack, Elsewhere, "told", "told")


def patient(registration, seconds):
    """From now on ranks wait for one another so long."""
    session = registration._session
    session.target = attrs.evolve(session.target, timeout=seconds)
    session.driver._watch.timeout = seconds


def act(call, on, model, registration, victim, folder):
    if call == "register":
        commhub.register(model, Strikes(victim.at), process_group=on["replicate"], timeout=TIMEOUT)
    elif call == "swap":
        registration.swap(Strikes(victim.at))
    elif call == "save":
        registration.save(folder)
    elif call == "load":
        registration.load(folder)
    elif call == "schedule":
        registration.schedule({5: "fp16"})
    else:
        for step in (3, 4):  # who needs nothing more of the victim learns of it in the next one
            model.zero_grad()
            loss_of(model, step).backward()


def live(fault, call, place, rank, folder):
    """Be a rank: what it was told, after how many seconds, and what became of training afterwards."""
    me = current()
    dist.init_process_group(
        "gloo",
        store=me.connect("group"),
        rank=me.rank,
        world_size=me.world_size,
        timeout=timedelta(seconds=PATIENT),
    )
    on, victim = mesh(), Victim(fault, place, rank)
    on["shard"].get_group()._get_backend(torch.device("cpu"))._set_default_timeout(timedelta(seconds=GROUPS))
    hub = me.store
    hub.set(f"process {me.rank}", str(os.getpid()))
    model, registration = sharded(on, HOOK, register={"timeout": PATIENT})
    loop = Loop(model)
    loop.run(2)
    registration.save(folder)
    loop.run(1)
    if call == "step":
        registration.swap(Strikes(victim.at))
        loop.run(1)
    model.zero_grad()
    patient(registration, TIMEOUT)
    me.meet(hub, "set up")
    with contextlib.ExitStack() as stack:
        places(victim, stack, on["shard"].get_group())
        victim.armed = True
        kind, text, began = "", "", time.monotonic()
        try:
            act(call, on, model, registration, victim, folder)
        except BaseException as error:
            kind, text = type(error).__name__, str(error)
        ended_at = time.monotonic()
        if victim.is_here:
            assert victim.went_on.wait(30), "the fault did not strike"
        seconds = ended_at - (began if victim.over is None else victim.over)
    ended(hub, fault, victim)
    after = "" if loses_a_group(fault, call, place) else go_on(on, model)
    return kind, text, seconds, after


def loses_a_group(fault, call, place):
    """Whether FSDP can no longer use its group: a rank is gone, or one did not come to FSDP's own exchange."""
    return fault == "killed" or (call == "step" and (fault == "stopped" or place == "shards"))


def ended(hub, fault, victim):
    """Wait for all who are left; who is stopped goes on when all others have come."""
    size = dist.get_world_size()
    came = int(hub.add("ended", 1))
    if fault == "stopped" and not victim.is_here and came == size - 1:
        os.kill(int(hub.get(f"process {victim.rank}")), signal.SIGCONT)
    while int(hub.add("ended", 0)) < size - (fault == "killed"):
        time.sleep(0.01)


def go_on(on, model):
    """Register anew and train a step: empty, or what is wrong with it."""
    try:
        commhub.register(model, "allreduce", process_group=on["replicate"], timeout=PATIENT)
        model.zero_grad()
        loss_of(model, 9).backward()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    mine, group = gradients(model), on["replicate"].get_group()
    every = [None] * dist.get_world_size(group)
    dist.all_gather_object(every, mine, group=group)
    return "" if mine and all(same([mine], [one]) for one in every) else "replicas differ"


def loaded(folder):
    _, registration = sharded(mesh(), HOOK, register={"timeout": PATIENT})
    registration.load(folder)
    return registration.step


QUICK = [
    ("raises", "save", "switch", 0),
    ("raises", "save", "write", 2),
    ("interrupted", "swap", "prepare", 1),
    ("interrupted", "step", "decode", 3),
]
KINDS = [(fault, call, place) for call, there in PLACES.items() for place in there for fault in FAULTS]
TURNS = [(*kind, 0 if kind[2] == "switch" else (number + number // 4) % 4) for number, kind in enumerate(KINDS)]
ALL = [*TURNS, *(case for case in QUICK if case not in TURNS)]
"""Every fault in every place, on each rank in turn; on the first one where it alone comes there."""


@pytest.mark.parametrize(("fault", "call", "place", "rank"), ALL if EVERY else QUICK)
def test_a_fault_of_one_rank_is_told_to_all_and_no_checkpoint_is_in_part(ranks, tmp_path, fault, call, place, rank):
    results = ranks.fresh(live, 4, fault, call, place, rank, tmp_path, init=False, timeout=100, grace=60)
    for number, result in enumerate(results):
        if (number, fault) == (rank, "killed"):
            assert result.exitcode == -signal.SIGKILL
            continue
        assert result.error is None, result.error
        kind, text, seconds, after = result.value
        if number == rank and fault in ("raises", "interrupted"):
            assert kind in ("OSError", "KeyboardInterrupt", "CheckpointError", "RegistrationError", "HookError")
        elif call == "step" and loses_a_group(fault, call, place) and number // 2 == rank // 2:
            assert kind in ("RuntimeError", "HookError", "HookTimeoutError")  # FSDP's own exchange may be the first
        else:
            assert kind in ("CheckpointError", "RegistrationError", "HookError", "HookTimeoutError"), (number, text)
            if call != "step":
                own = "this rank came|" if number == rank else ""
                assert re.search(rf"{own}ranks? [\d, ]*\b{rank}\b", text), (number, text)
        assert seconds < (GROUPS if call == "step" else 2 * TIMEOUT) + 3, (number, text)
        assert after == "", (number, after)
    (step,) = set(ranks(loaded, 4, tmp_path))
    assert step == 2 or (step, fault, place) == (
        3,
        "stopped",
        "switch",
    )  # it goes on and completes what all have written
