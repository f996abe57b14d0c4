"""A message that meets a closed connection: Gloo forgets to wake who sends it, and its group is freed later."""

import gc
import os
import signal
import time
from types import SimpleNamespace

import torch
import torch.distributed as dist

import commhub
from commhub.drivers import _graveyard, _thread
from commhub.drivers._gloo import GlooCommunicator
from commhub.drivers._threads import are_at_rest
from commhub.testing import current

TIMEOUT = 1.5
"""Seconds after which Gloo gives a collective up, awake or asleep."""


def held():
    gc.collect()
    return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))


def more(now, before):
    return any(a > b for a, b in zip(now, before, strict=True))


def posted():
    """Wait until Gloo has posted all that it can."""
    while not are_at_rest("pt_gloo_runloop", 0.05):
        pass


def close_midway(number):
    """Rank 1 is stopped while it waits to send; rank 0 is ready to receive, and closes. Whether rank 1 sleeps then."""
    rank, hub = dist.get_rank(), current().store
    communicator = GlooCommunicator(dist.PrefixStore(f"forgotten {number}", hub), rank, 2, TIMEOUT)
    job = SimpleNamespace(kind=commhub.AllReduce, payload=torch.ones(20_000), p=2, group=None)
    if rank == 0:
        victim = int(hub.get(f"ready {number}"))
        os.kill(victim, signal.SIGSTOP)
        communicator.launch(job)
        posted()
        assert communicator.abort(3.0)
        communicator.close()
        os.kill(victim, signal.SIGCONT)
        hub.set(f"closed {number}", "")
        return hub.get(f"asleep {number}") == b"True"
    flight = communicator.launch(job)
    posted()
    hub.set(f"ready {number}", str(os.getpid()))
    hub.wait([f"closed {number}"])
    assert communicator.abort(3.0)
    asleep = not flight.is_done()
    communicator.close()
    hub.set(f"asleep {number}", str(asleep))
    return asleep


def closed_midway(waits):
    """What was held before, at once, and when the timeout was over; how many groups are kept then.

    Where it ``waits`` for nothing: how a forked child ended, in place of the last.
    """
    current().meet(current().store, "the start")
    before = held()
    assert any(close_midway(number) for number in range(5)), "nothing sleeps"
    if not waits and os.fork() == 0:  # a forked child ends as if nothing were buried here
        _thread._close_all()
        os._exit(len(_graveyard._kept))
    at_once = later = held()
    end = time.monotonic() + TIMEOUT + 2.0
    while waits and more(later, before) and time.monotonic() < end:
        time.sleep(0.05)
        later = held()
    return before, at_once, later, len(_graveyard._kept) if waits else os.wait()[1]


def test_what_sleeps_in_a_closed_group_is_freed_after_its_timeout_though_nobody_asks(ranks):
    before, at_once, later, graves = ranks.fresh(closed_midway, 2, True, timeout=60)[1].value
    assert more(at_once, before)
    assert not more(later, before), (before, later)
    assert graves == 0


def test_a_process_may_end_while_something_sleeps_in_a_closed_group(ranks):
    _, result = ranks.fresh(closed_midway, 2, False, timeout=60)
    *_, child = result.value
    assert child == 0
    assert (result.exitcode, "terminate" in result.stderr) == (0, False), result.stderr
