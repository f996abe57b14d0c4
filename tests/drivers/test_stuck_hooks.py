"""A hook that does not return: backward raises in time, and the model is of use again once the hook has returned."""

import os
import threading
import time

import pytest
import torch
import torch.distributed as dist

import commhub
from commhub.testing import assert_equal_across_ranks, current

from .models import backward, build

TIMEOUT = 1.0


class Stuck:
    """Averages; in step 2 one rank's hook waits to be released, before or after its first collective."""

    def __init__(self, rank, late, place):
        self.rank, self.late, self.place = rank, late, place
        self.released = threading.Event()

    def reduce(self, bucket):
        stuck = (bucket.rank, bucket.step, bucket.index) == (self.rank, 2, self.place)
        if stuck and not self.late:
            self.released.wait(60)
        mean = (yield commhub.AllReduce(bucket.flat)).clone()
        if stuck and self.late:
            self.released.wait(60)
        bucket.flat.fill_(1e6)  # what must not be seen in a later step
        bucket.flat.copy_((yield commhub.AllReduce(mean)))


def stick(victim, late, buckets, place):
    model, twin = build(buckets), build(buckets)
    hook = Stuck(victim, late, place)
    registration = commhub.register(model, hook, timeout=30)
    registration._session.engine.driver._watch.timeout = TIMEOUT  # of a step, not of registering
    for step in range(2):
        backward(model, step)
        backward(twin, step)  # buckets are rebuilt after the first step
    told = []

    def tried(act):
        began = time.monotonic()
        try:
            act()
        except commhub.CommhubError as error:
            told.append((type(error).__name__, str(error), time.monotonic() - began))
        else:
            told.append(None)

    hub = current().store
    tried(lambda: backward(model, 2))
    tried(lambda: backward(model, 3))
    tried(lambda: registration.swap("allreduce"))
    tried(lambda: commhub.register(model, "allreduce", timeout=30))
    hub.add("tried", 1)
    while int(hub.add("tried", 0)) < dist.get_world_size():
        time.sleep(0.01)
    hook.released.set()
    began = time.monotonic()
    while time.monotonic() - began < 10:
        try:
            commhub.register(model, "allreduce", timeout=30)
            break
        except commhub.RegistrationError:
            time.sleep(0.01)
    back = time.monotonic() - began
    for step in range(5, 8):
        backward(model, step)
        backward(twin, step)
        grads, expected = ([p.grad for p in m.parameters()] for m in (model, twin))
        assert all(torch.equal(a, b) for a, b in zip(grads, expected, strict=True))
    assert_equal_across_ranks(grads)
    return told, back


CASES = [(2, 1, False, 1, 0), (2, 0, False, 12, 5), (3, 1, True, 12, 11)]


@pytest.mark.parametrize(
    ("nproc", "victim", "late", "buckets", "place"), CASES if os.environ.get("COMMHUB_EVERY_CHECK") else CASES[1:]
)
def test_backward_raises_in_time_while_a_hook_does_not_return(ranks, nproc, victim, late, buckets, place):
    for rank, (told, back) in enumerate(ranks(stick, nproc, victim, late, buckets, place, timeout=60)):
        first, second, swapped, registered = told
        for kind, text, seconds in (first, second):
            assert "Stuck" in text
            assert seconds < TIMEOUT + 5
            assert kind == "HookTimeoutError" or rank != victim
        assert rank != victim or "has not returned" in second[1]
        for kind, text, seconds in (swapped, registered):
            assert kind == "RegistrationError"
            assert "has not returned" in text
            assert f"rank {victim}" in text
            assert seconds < TIMEOUT + 5
        assert back < 5


class Odd(BaseException):
    pass


class Unspeakable(Exception):
    def __str__(self):
        raise ValueError("no text")


FAULTS = {
    "SystemExit": lambda: SystemExit(3),
    "KeyboardInterrupt": lambda: KeyboardInterrupt(),
    "Odd": lambda: Odd("planned"),
    "Unspeakable": Unspeakable,
    "ValueError": lambda: ValueError("lone surrogate \udc80"),
    "GeneratorExit": lambda: GeneratorExit("planned"),
    "StopIteration": lambda: StopIteration("planned"),
}


class Raises:
    def __init__(self, fault, ranks, late):
        self.fault, self.ranks, self.late = fault, ranks, late

    def reduce(self, bucket):
        bad = bucket.rank in self.ranks and (bucket.step, bucket.index) == (1, 1)
        if bad and not self.late:
            raise FAULTS[self.fault]()
        mean = yield commhub.AllReduce(bucket.flat)
        if bad:
            raise FAULTS[self.fault]()
        bucket.flat.copy_((yield commhub.AllReduce(mean)))


class ClosesBadly:
    """What it does while it is being closed, because another bucket failed, is its own kind of fault."""

    def __init__(self, how):
        self.how = how

    def reduce(self, bucket):
        try:
            mean = yield commhub.AllReduce(bucket.flat)
            if (bucket.step, bucket.index) == (1, 0):
                raise ZeroDivisionError("planned")
            bucket.flat.copy_((yield commhub.AllReduce(mean)))
        except GeneratorExit:
            if self.how == "raises":
                raise SystemExit(4) from None
            yield commhub.AllReduce(bucket.flat)


def fail(hooks):
    told = []
    for hook in hooks:
        model, twin = build(6), build(6)
        registration = commhub.register(model, hook, timeout=20)
        failure, began = None, time.monotonic()
        for step in range(3):
            try:
                backward(model, step)
            except commhub.HookError as error:
                failure = step, str(error), time.monotonic() - began
                break
        registration.swap("allreduce")
        backward(model, 4)
        backward(twin, 4)
        for step in range(5, 8):
            backward(model, step)
            backward(twin, step)
            grads, expected = ([p.grad for p in m.parameters()] for m in (model, twin))
            assert all(torch.equal(a, b) for a, b in zip(grads, expected, strict=True))
        told.append(failure)
    return told


def test_nothing_that_a_hook_raises_ends_its_thread_and_every_rank_hears_of_it(ranks):
    kinds = [(fault, late) for fault in FAULTS for late in (False, True)]
    for rank, told in enumerate(ranks(fail, 2, [Raises(fault, [1], late) for fault, late in kinds], timeout=60)):
        for (fault, _), (step, text, seconds) in zip(kinds, told, strict=True):
            assert step == 1
            assert (fault if fault != "StopIteration" else "RuntimeError") in text, text
            assert "rank 1" in text
            assert ("rank 1 failed" in text) == (rank == 0)
            assert seconds < 10


class ClosesSlowly:
    """Averages; while it is closed, because another bucket failed, rank 1 waits to be released."""

    def __init__(self):
        self.released = threading.Event()

    def reduce(self, bucket):
        fails = bucket.rank == 1 and (bucket.step, bucket.index) == (1, 2)
        try:
            mean = yield commhub.AllReduce(bucket.flat)
            if fails:
                raise ZeroDivisionError("planned")
            bucket.flat.copy_((yield commhub.AllReduce(mean)))
        except GeneratorExit:
            if bucket.rank == 1:
                self.released.wait(30)
            raise


def close_slowly():
    model, hook = build(6), ClosesSlowly()
    registration = commhub.register(model, hook, timeout=30)
    registration._session.engine.driver._watch.timeout = 4.0
    backward(model, 0)
    told, began = [], time.monotonic()
    for act in (lambda: backward(model, 1), lambda: registration.swap("allreduce")):
        try:
            act()
        except commhub.CommhubError as error:
            told.append(str(error))
    seconds = time.monotonic() - began
    hub = current().store
    hub.add("tried", 1)
    while int(hub.add("tried", 0)) < dist.get_world_size():
        time.sleep(0.01)
    hook.released.set()
    time.sleep(0.2)
    commhub.register(model, "allreduce", timeout=20)
    backward(model, 2)
    assert_equal_across_ranks([p.grad for p in model.parameters()])
    return told, seconds


def test_a_hook_that_does_not_come_back_from_being_closed_holds_nobody_up(ranks):
    for told, seconds in ranks(close_slowly, 2, timeout=60):
        assert "ZeroDivisionError: planned" in told[0]
        assert "has not returned" in told[1]
        assert seconds < 9


def test_what_a_hook_does_while_it_is_closed_harms_nobody(ranks):
    for told in ranks(fail, 2, [ClosesBadly("raises"), ClosesBadly("yields")], timeout=60):
        assert all("planned" in text and seconds < 10 for _, text, seconds in told)
