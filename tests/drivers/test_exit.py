"""A process ends as it should while a thread of commhub's waits in C++, whenever what it waits for comes."""

import builtins
import gc
import os
import signal
import threading
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist

from commhub.drivers._store import Errand, own_connection
from commhub.testing import current


class Answered:
    """Lets the store answer while the interpreter that holds this ends, and keeps it from ending for a while."""

    def __init__(self, pid):
        self._pid, self._kill, self._sleep = pid, os.kill, time.sleep
        gc.freeze()  # nothing else takes its time, before or after

    def __del__(self):
        self._kill(self._pid, signal.SIGCONT)
        self._sleep(0.5)


def stop(pid):
    os.kill(pid, signal.SIGSTOP)
    while Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
        time.sleep(0.001)


def ask(what, store):
    """An errand that needs an answer."""
    if what == "add":
        return lambda: store.add("questions", 1)
    if what == "wait":
        return lambda: store.wait(["nothing"], timedelta(seconds=0.2))
    if what == "again":
        return lambda: [store.check(["nothing"]) or time.sleep(0.001) for _ in iter(int, 1)]
    return lambda: own_connection(store, 20.0)


def end_while_asking(what):
    """Rank 0 holds a store and is stopped; rank 1 asks, and ends."""
    rank, here = current().rank, current().store
    if rank == 0:
        store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
        here.set("where", f"{store.port} {os.getpid()}")
        here.wait(["asked"], timedelta(seconds=60))
        return
    port, holder = map(int, here.get("where").split())
    store = dist.TCPStore("localhost", port, is_master=False, wait_for_workers=False)
    mine = own_connection(store, 20.0)
    if what != "again":
        stop(holder)
    errand = Errand(ask(what, mine))
    assert not errand.wait(0.2)
    if what == "again":
        stop(holder)
    here.set("asked", "")
    builtins.answered = Answered(holder)


class Lasts:
    """Keeps the interpreter that holds this from ending for a while."""

    def __init__(self, seconds):
        self._seconds, self._sleep = seconds, time.sleep
        gc.freeze()

    def __del__(self):
        self._sleep(self._seconds)


def end_while_connecting():
    """What gives up in C++, with an error, when the interpreter has begun to end: some two seconds after the call."""
    errand = Errand(lambda: dist.ProcessGroupGloo(dist.HashStore(), 0, 2, timedelta(seconds=3)))
    assert not errand.wait(0.2)
    builtins.lasts = Lasts(2.5)


def test_a_group_that_cannot_connect_while_the_interpreter_ends_does_not_abort_it(ranks):
    (result,) = ranks.fresh(end_while_connecting, 1, init=False, timeout=30, grace=30)
    assert result.exitcode == 0, result.stderr
    assert "terminate called" not in result.stderr


@pytest.mark.parametrize("what", ["add", "wait", "again", "connect"])
def test_an_answer_that_comes_while_the_interpreter_ends_does_not_abort_it(ranks, what):
    _, second = ranks.fresh(end_while_asking, 2, what, init=False, timeout=30, grace=30)
    assert second.exitcode == 0, second.stderr
    assert "terminate called" not in second.stderr


def refuse_errands():
    """At exit, after commhub's own handlers, nothing that could still be under way at the end is begun."""
    import commhub.drivers._store as ours

    ours._let_them_return()
    with pytest.raises(RuntimeError, match="ends"):
        Errand(lambda: None)
    return [thread.name for thread in threading.enumerate() if thread.name == "commhub-errand"]


def test_no_errand_begins_after_the_last_was_waited_for(ranks):
    (result,) = ranks.fresh(refuse_errands, 1)
    assert (result.value, result.error) == ([], None)
