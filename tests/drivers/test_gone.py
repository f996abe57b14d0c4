"""A rank that is gone, stopped, or has failed, wherever it was: its peers name it, and the cause, in time."""

import itertools
import os
import random
import re
import signal
import subprocess
import threading
import time

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import commhub
from commhub.drivers import _meeting
from commhub.testing import current

EVERY = bool(os.environ.get("COMMHUB_EVERY_CHECK"))
TIMEOUT = 4.0
AT = 2
"""The step in which it happens."""


def end(how):
    if how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "exited":
        os._exit(3)
    if how == "stopped":
        subprocess.Popen(["sh", "-c", f"sleep {TIMEOUT + 5}; kill -CONT {os.getpid()}"])
        os.kill(os.getpid(), signal.SIGSTOP)
        return
    raise ZeroDivisionError("planned")


class Ends:
    """Averages in two stages, and meets its end somewhere in a step, or as it is prepared."""

    def __init__(self, how, phase, victim):
        self.how, self.phase, self.victim = how, phase, victim
        self.began = 0.0

    def prepare(self, setup):
        self.began = time.monotonic()
        at = setup.rank == self.victim
        if self.phase == "prepare":
            if at:
                end(self.how)
            everyone = list(range(setup.world_size))
            setup.partition([everyone[:2], everyone[2:]] if everyone[2:] else [everyone])

    def reduce(self, bucket):
        at = bucket.rank == self.victim and bucket.step == AT and bucket.index == 1
        if at and self.phase == "encode":
            end(self.how)
        mean = yield commhub.AllReduce(bucket.flat)
        if at and self.phase == "stages":
            end(self.how)
        bucket.flat.copy_((yield commhub.AllReduce(mean)))
        if at and self.phase == "confirm":
            end(self.how)


class Averages:
    """Averages parameters every second step, and meets its end in one of these."""

    def __init__(self, how, phase, victim):
        self.how, self.victim = how, victim

    def due(self, step):
        return self.everyone if step % 2 == 1 else None

    def prepare(self, setup):
        self.everyone = setup.partition([list(range(setup.world_size))])

    def reduce(self, bucket):
        if bucket.rank == self.victim and bucket.step >= AT:
            end(self.how)
        bucket.flat.copy_((yield commhub.AllReduce(bucket.flat)))


def store_of_our_own():
    """A process group whose store ends with rank 0."""
    rank, p, here = current().rank, current().world_size, current().store
    if rank == 0:
        base = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        here.set("port", str(base.port))
    else:
        base = dist.TCPStore("127.0.0.1", int(here.get("port")), is_master=False, wait_for_workers=False)
    dist.init_process_group("gloo", store=base, rank=rank, world_size=p)
    current().meet(here, "the start")


def warm_up():
    """Do once what takes long the first time, so that no rank is far behind the others afterwards."""
    commhub.register(DistributedDataParallel(torch.nn.Linear(2, 2)), "allreduce", timeout=60).remove()


def meet_an_end(how, phase, victim, holds):
    """What a rank that is left makes of it: the error's kind, its text, and seconds since then, about."""
    if holds:
        store_of_our_own()
    if phase in {"handshake", "prepare"}:
        warm_up()
    rank = dist.get_rank()
    if phase == "handshake" and rank == victim:
        end(how)
    torch.manual_seed(0)
    layers = [torch.nn.Linear(16, 16) for _ in range(4)]
    model = DistributedDataParallel(torch.nn.Sequential(*layers), bucket_cap_mb=0.001, init_sync=phase != "handshake")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    hook = (Averages if phase == "average" else Ends)(how, phase, victim)
    began = time.monotonic()
    try:
        commhub.register(model, hook, timeout=TIMEOUT, optimizer=optimizer)
        for step in range(8):
            if phase == "forward" and step == AT and rank == victim:
                end(how)
            began = time.monotonic()
            model(torch.ones(2, 16)).sum().backward()
            optimizer.step()
    except commhub.CommhubError as error:
        since = (hook.began or began) if phase == "prepare" else began  # the end may come before its own prepare
        told = type(error).__name__, str(error), time.monotonic() - since
        if rank == victim and how == "raised":
            raise
        return told
    return "nothing", "", 0.0


def check(ranks, how, phase, p, victim, holds=False):
    """All ranks that are left name the victim and no other; returns the seconds it took the slowest."""
    results = ranks.fresh(meet_an_end, p, how, phase, victim, holds, init=not holds, timeout=60, grace=30)
    slowest = 0.0
    for rank, result in enumerate(results):
        if rank == victim:
            continue
        assert result.error is None, (rank, result.error)
        kind, text, seconds = result.value
        case = how, phase, p, victim, holds, rank, kind, text, seconds
        assert "Error" in kind, case
        blamed = set(re.findall(r"ranks? (\d+)(?:, (\d+))* (?:failed|is gone|are gone|has exited|do|could)", text))
        named = {int(number) for found in blamed for number in found if number}
        assert named <= {victim}, case
        assert f"rank {victim}" in text, case
        if how == "raised" and phase != "handshake":
            assert "ZeroDivisionError: planned" in text, case
        elif how != "stopped" and phase != "handshake":
            assert "gone" in text or "exited" in text or "did not come" in text, case
        assert seconds < TIMEOUT + 5, case
        print(f"{how} in {phase}, {p} ranks, rank {rank} after {seconds:.2f} s: {kind}: {text}")
        slowest = max(slowest, seconds)
    return slowest


PHASES = ["handshake", "prepare", "forward", "encode", "stages", "confirm", "average"]
HOWS = ["killed", "raised", "exited", "stopped"]
WHERE = itertools.cycle([(4, 1), (3, 0), (2, 1), (4, 0), (3, 1)])
"""Ranks, and the victim: each manner and phase has one of them. ``tests/faults`` has all of them for two and three."""
CASES = [("killed", "stages", 3, 1), ("killed", "prepare", 3, 1), ("raised", "confirm", 3, 1)]
if EVERY:
    CASES += [case for how in HOWS for phase in PHASES if (case := (how, phase, *next(WHERE))) not in CASES]


@pytest.mark.parametrize(("how", "phase", "p", "victim"), CASES)
def test_the_peers_of_a_rank_that_is_gone_name_it_and_no_other(ranks, how, phase, p, victim):
    check(ranks, how, phase, p, victim)


HOLDING = [("raised", "forward", 3)]
if EVERY:
    HOLDING += [(how, phase, 2 + (how != "raised")) for how in HOWS[:3] for phase in PHASES]


@pytest.mark.parametrize(("how", "phase", "p"), HOLDING)
def test_where_the_store_ends_with_it_too(ranks, how, phase, p):
    check(ranks, how, phase, p, 0, holds=True)


def leave_in_training(what, p, slow):
    """Rank 1 leaves its peers behind; those say what they make of it, and after how many seconds."""
    rank = dist.get_rank()
    torch.manual_seed(0)
    model = DistributedDataParallel(torch.nn.Sequential(*[torch.nn.Linear(16, 16) for _ in range(4)]))
    registration = commhub.register(model, Ends("raised", "nowhere", 1), timeout=TIMEOUT)
    try:
        for step in range(10_000):
            if step == AT and rank == 1:
                if what == "closed":
                    registration.close()
                    time.sleep(2.0)
                if what == "killed at random":
                    threading.Timer(random.random() / 5, end, ["killed"]).start()
                elif what == "killed":
                    end("killed")
                else:
                    return None
            if step == AT and rank == p - 1:
                time.sleep(slow)
            began = time.monotonic()
            model(torch.ones(2, 16)).sum().backward()
    except commhub.HookError as error:
        return str(error), time.monotonic() - began
    return None


def left(ranks, what, p, slow, words):
    results = ranks.fresh(leave_in_training, p, what, p, slow, timeout=60, grace=30)
    for rank, result in enumerate(results):
        if rank != 1:
            assert result.error is None, result.error
            text, seconds = result.value
            assert f"rank {rank}: {words}" in text, (what, rank, text)
            assert seconds < TIMEOUT + 5


def test_a_rank_that_trains_while_its_peers_miss_another_is_not_blamed(ranks):
    left(ranks, "killed", 3, 3.5, "rank 1 is gone: ")


@pytest.mark.parametrize(("what", "words"), [("closed", "has closed its registration"), ("returns", "has exited")])
def test_a_rank_that_leaves_its_peers_behind_says_so_itself(ranks, what, words):
    left(ranks, what, 3, 0.0, f"rank 1 {words}")


@pytest.mark.skipif(not EVERY, reason="many processes")
@pytest.mark.parametrize("p", [2, 3, 4])
@pytest.mark.parametrize("number", range(4))
def test_whenever_a_rank_is_killed_its_peers_name_it(ranks, p, number):
    left(ranks, "killed at random", p, 0.0 if number else 1.5, "rank 1 is gone: ")


class Sleeps:
    """Spends a while in its own code on rank 1."""

    def __init__(self, seconds):
        self.seconds = seconds

    def reduce(self, bucket):
        if bucket.rank == 1 and bucket.step == AT:
            time.sleep(self.seconds)
        bucket.flat.copy_((yield commhub.AllReduce(bucket.flat)))


def keep_them_waiting(where):
    model = DistributedDataParallel(torch.nn.Linear(8, 8))
    rank = dist.get_rank()
    commhub.register(model, Sleeps(4.0 if where == "hook" else 0.0), timeout=2.0 if rank != 1 else 20.0)
    texts = []
    for step in range(AT + 1):
        if step == AT and rank == 1 and where == "script":
            time.sleep(4.0)
        try:
            model(torch.ones(2, 8)).sum().backward()
        except commhub.HookError as error:
            texts.append((type(error).__name__, str(error)))
    return texts


@pytest.mark.parametrize(
    ("where", "words"),
    [
        ("hook", r"has been in the hook's code for \d.\d s \(bucket 0, step 2\)"),
        ("script", "asks for nothing at present, and came last to AllReduce of commhub's own in step 1"),
    ],
)
def test_who_keeps_its_peers_waiting_is_named_with_what_it_does(ranks, where, words):
    first, _, last = ranks(keep_them_waiting, 3, where)
    for [(_, text)] in (first, last):
        assert re.search(f"AllReduce did not end within 2 s; rank 1 {words}.$", text), text
    assert "HookTimeoutError" in {first[0][0], last[0][0]}


class FailsOnce(Ends):
    """Raises in ``prepare`` on one rank, while the others make groups."""

    def prepare(self, setup):
        if setup.rank == self.victim:
            raise ZeroDivisionError("planned")
        setup.partition([range(setup.world_size)])


def fail_in_prepare_and_register_again():
    model = DistributedDataParallel(torch.nn.Linear(8, 8))
    before = threading.enumerate()
    began = time.monotonic()
    try:
        commhub.register(model, FailsOnce("raised", "prepare", 1), timeout=20)
    except Exception as error:
        told = f"{type(error).__name__}: {error}"
    seconds = time.monotonic() - began
    threads = [thread.name for thread in threading.enumerate() if thread.name == "commhub" and thread not in before]
    registration = commhub.register(model, Ends("raised", "nowhere", 1), timeout=20)
    model(torch.ones(2, 8)).sum().backward()
    return told, seconds, threads, registration.step


def test_a_rank_that_raises_in_prepare_ends_its_peers_wait_for_groups_and_leaves_no_trace(ranks):
    first, second, third = ranks(fail_in_prepare_and_register_again, 3)
    assert second[0].endswith("its prepare raised ZeroDivisionError: planned")
    for told, seconds, threads, step in (first, second, third):
        assert "ZeroDivisionError: planned" in told
        assert "rank 1 " in told or told == second[0]
        assert (seconds < 5, threads, step) == (True, [], 1)


def die_while_connecting(victim):
    warm_up()
    whole, is_victim, began = _meeting.Meeting.get, dist.get_rank() == victim, 0.0

    def get(meeting, key):
        nonlocal began
        began = time.monotonic()
        if is_victim and int(key.rpartition("/")[2]) != victim:
            end("killed")
        return whole(meeting, key)

    _meeting.Meeting.get = get
    model = DistributedDataParallel(torch.nn.Linear(8, 8))
    try:
        commhub.register(model, "allreduce", timeout=TIMEOUT)
    except commhub.CommhubError as error:
        return type(error).__name__, str(error), time.monotonic() - began
    return None


@pytest.mark.parametrize(
    ("p", "victim"), [(p, victim) for p in (2, 3, 4) for victim in range(p)] if EVERY else [(2, 1), (4, 1)]
)
def test_a_rank_that_dies_while_gloo_connects_is_named(ranks, p, victim):
    results = ranks.fresh(die_while_connecting, p, victim, timeout=60, grace=30)
    for rank, result in enumerate(results):
        if rank != victim:
            kind, text, seconds = result.value
            assert kind == "RegistrationError"
            assert re.search(rf"rank {victim} (is gone|did not come)", text), text
            assert seconds < TIMEOUT + 5
