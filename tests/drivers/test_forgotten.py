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
from commhub.testing import current

TIMEOUT = 1.5
"""Seconds after which Gloo gives a collective up, awake or asleep."""


def held():
    gc.collect()
    return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))


def more(now, before):
    return any(a > b for a, b in zip(now, before, strict=True))


def closed_midway(waits):
    """Rank 1 is stopped while it waits to send; rank 0 is ready to receive, and closes. What rank 1 makes of it.

    Whether it sleeps; what it held before, at once, and when the timeout was over; how many groups it keeps then, or
    how a forked child ended.
    """
    rank, hub = dist.get_rank(), current().store
    dist.barrier()
    before = held()
    communicator = GlooCommunicator(dist.PrefixStore("forgotten", hub), rank, 2, TIMEOUT)
    job = SimpleNamespace(kind=commhub.AllReduce, payload=torch.ones(20_000), p=2, group=None)
    if rank == 0:
        victim = int(hub.get("is ready to send"))
        time.sleep(0.1)
        os.kill(victim, signal.SIGSTOP)
        communicator.launch(job)
        time.sleep(0.1)
        assert communicator.abort(3.0)
        communicator.close()
        os.kill(victim, signal.SIGCONT)
        hub.set("closed", "")
        return None
    flight = communicator.launch(job)
    hub.set("is ready to send", str(os.getpid()))
    hub.wait(["closed"])
    assert communicator.abort(3.0)
    asleep = not flight.is_done()
    communicator.close()
    del communicator, flight
    if not waits and os.fork() == 0:  # a forked child ends as if nothing were buried here
        _thread._close_all()
        os._exit(len(_graveyard._kept))
    at_once = later = held()
    end = time.monotonic() + TIMEOUT + 2.0
    while waits and more(later, before) and time.monotonic() < end:
        time.sleep(0.05)
        later = held()
    return asleep, before, at_once, later, len(_graveyard._kept) if waits else os.wait()[1]


def test_what_sleeps_in_a_closed_group_is_freed_after_its_timeout_though_nobody_asks(ranks):
    asleep, before, at_once, later, graves = ranks.fresh(closed_midway, 2, True, timeout=60)[1].value
    assert asleep
    assert more(at_once, before)
    assert not more(later, before), (before, later)
    assert graves == 0


def test_a_process_may_end_while_something_sleeps_in_a_closed_group(ranks):
    _, result = ranks.fresh(closed_midway, 2, False, timeout=60)
    asleep, *_, child = result.value
    assert asleep
    assert child == 0
    assert (result.exitcode, "terminate" in result.stderr) == (0, False), result.stderr
