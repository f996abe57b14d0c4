"""A process ends as it should while a thread of commhub's waits in C++, whenever what it waits for comes."""

import atexit
import builtins
import gc
import os
import signal
import threading
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import commhub
from commhub.drivers import _store, _thread
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


def hold(here):
    """Hold a store until a peer has asked it."""
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    here.set("where", f"{store.port} {os.getpid()}")
    here.wait(["asked"], timedelta(seconds=60))


def found(here):
    """A connection to that store, and the process that holds it."""
    port, holder = map(int, here.get("where").split())
    return dist.TCPStore("localhost", port, is_master=False, wait_for_workers=False), holder


def end_while_asking(what):
    """Rank 0 holds a store and is stopped; rank 1 asks, and ends."""
    rank, here = current().rank, current().store
    if rank == 0:
        hold(here)
        return
    store, holder = found(here)
    mine = own_connection(store, 20.0)
    if what != "again":
        stop(holder)
    errand = Errand(ask(what, mine))
    assert not errand.wait(0.2)
    if what == "again":
        stop(holder)
    here.set("asked", "")
    builtins.answered = Answered(holder)


def ask_afterwards():
    """Rank 1's own question to the store, after commhub has ended there."""
    import commhub.drivers._store as ours

    rank, here = current().rank, current().store
    if rank == 0:
        hold(here)
        return None
    store, holder = found(here)
    mine = own_connection(store, 20.0)
    stop(holder)
    errand = Errand(lambda: mine.add("questions", 1))
    assert not errand.wait(0.2)
    here.set("asked", "")
    ours._let_them_return()
    later = threading.Timer(0.2, os.kill, (holder, signal.SIGCONT))
    later.start()
    answer = store.add("of the user's own", 1)
    later.join()
    return answer, errand.wait(0.2)


def test_a_handler_of_the_users_that_runs_later_has_its_questions_answered(ranks):
    _, second = ranks.fresh(ask_afterwards, 2, init=False, timeout=30, grace=30)
    assert (second.value, second.error, second.exitcode) == ((1, False), None, 0), second.stderr


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


class Interrupted:
    """Stands among what is waited for at exit; a Ctrl-C comes when its turn is there for the first time."""

    native_id = None

    def __init__(self):
        self.times = 0

    def join(self, seconds):
        self.times += 1
        if self.times == 1:
            signal.raise_signal(signal.SIGINT)

    def close(self, leaving):
        self.join(None)

    def is_alive(self):
        return False


def end_and_be_interrupted():
    """Rank 0 holds a store and is stopped; rank 1 asks, ends, and is interrupted meanwhile."""
    if current().rank == 1:
        builtins.interrupted = Interrupted()
        _store._threads.add(builtins.interrupted)
    end_while_asking("add")


def test_an_interrupt_at_exit_leaves_no_errand_that_an_answer_would_abort(ranks):
    _, second = ranks.fresh(end_and_be_interrupted, 2, init=False, timeout=30, grace=30)
    assert second.exitcode == 0, second.stderr
    assert "terminate called" not in second.stderr


def interrupt_while_drivers_close():
    """How often the interrupted one was closed, and whether the other one's thread goes on."""
    model = DistributedDataParallel(torch.nn.Linear(4, 4))
    commhub.register(model, "allreduce", timeout=20)
    model(torch.ones(2, 4)).sum().backward()
    (real,), first = list(_thread._drivers), Interrupted()
    thread = real._thread
    _thread._drivers = [first, real]
    atexit._run_exitfuncs()
    return first.times, thread.is_alive()


def test_an_interrupt_at_exit_leaves_no_driver_open(ranks):
    (result,) = ranks.fresh(interrupt_while_drivers_close, 1, timeout=60, grace=30)
    assert (result.value, result.error) == ((2, False), None)
