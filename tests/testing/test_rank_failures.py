"""Whatever goes wrong on a rank becomes one RankError that tells all, and the next call works."""

import ctypes
import os
import signal
import sys
import threading
import time

import pytest
import torch
import torch.distributed as dist

from commhub.testing import RankError

pytestmark = pytest.mark.filterwarnings("error")


def healthy():
    total = torch.ones(1)
    dist.all_reduce(total)
    return total.item()


@pytest.fixture(autouse=True)
def _the_next_call_works(ranks):
    yield
    assert ranks(healthy, 2) == [2.0, 2.0]


def raise_on(rank):
    if dist.get_rank() == rank:
        raise ValueError(f"no luck on {rank}\nand more")
    dist.barrier()


def test_an_exception_on_one_rank_is_told_while_its_peer_waits_in_a_collective(ranks):
    with pytest.raises(RankError, match="rank 1: ValueError: no luck on 1") as caught:
        ranks(raise_on, 2, 1, grace=1.0)
    assert list(caught.value.errors) == [1]
    kind, message, traceback = caught.value.errors[1]
    assert (kind, message) == ("ValueError", "no luck on 1\nand more")
    assert "in raise_on" in traceback
    assert "_worker.py" not in traceback
    assert "barrier" in caught.value.stacks[0]
    assert traceback.rstrip() in str(caught.value)


def raise_everywhere():
    raise KeyError(dist.get_rank())


def test_all_ranks_exceptions_are_gathered(ranks):
    with pytest.raises(RankError, match="failed on 3 of 3 ranks") as caught:
        ranks(raise_everywhere, 3)
    assert [e.message for _, e in sorted(caught.value.errors.items())] == ["0", "1", "2"]


def late_exception():
    time.sleep(0.3 * dist.get_rank())
    raise RuntimeError("late")


def test_a_peer_has_the_grace_to_tell_its_side(ranks):
    with pytest.raises(RankError) as caught:
        ranks(late_exception, 2, grace=10)
    assert sorted(caught.value.errors) == [0, 1]


def hang():
    if dist.get_rank() == 0:
        dist.barrier()
    else:
        threading.Thread(target=stuck_in_a_thread, daemon=True).start()
        time.sleep(100)


def stuck_in_a_thread():
    time.sleep(100)


def test_a_hang_shows_every_ranks_stacks_of_all_threads(ranks):
    ranks(healthy, 2)
    start = time.monotonic()
    with pytest.raises(RankError, match=r"no answer within 1\.5 s") as caught:
        ranks(hang, 2, timeout=1.5)
    assert time.monotonic() - start < 10
    assert [e.type_name for e in caught.value.errors.values()] == ["TimeoutError"] * 2
    assert "in barrier" in caught.value.stacks[0]
    assert "in hang" in caught.value.stacks[1]
    assert "stuck_in_a_thread" in str(caught.value)


def die(how):
    print("last words", file=sys.stderr, flush=True)
    if dist.get_rank() == 1:
        if how == "abort":
            os.abort()
        if how == "segfault":
            ctypes.string_at(0)
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "exit":
            os._exit(3)
    time.sleep(100)


@pytest.mark.parametrize(
    ("how", "name"),
    [("abort", "SIGABRT"), ("segfault", "SIGSEGV"), ("kill", "SIGKILL"), ("exit", "exit 3")],
)
def test_a_death_in_native_code_is_named_at_once(ranks, how, name):
    ranks(healthy, 2)
    start = time.monotonic()
    with pytest.raises(RankError, match=f"rank 1: {name}: the process") as caught:
        ranks(die, 2, how)
    assert time.monotonic() - start < 10
    assert list(caught.value.errors) == [1]
    assert "last words" in caught.value.outputs[1]
    if how in ("abort", "segfault"):
        assert "in die" in str(caught.value)  # faulthandler's stack


def connect_in_two_parts():
    connect = dist.init_process_group

    def patched(*args, **kwargs):
        connect(*args, **kwargs)
        if dist.get_rank() == 1:
            patched.under_way = dist.isend(torch.ones(1), 0)
        else:
            time.sleep(0.3)
            dist.recv(torch.ones(1), 1)

    dist.init_process_group = patched


def die_at_once():
    if dist.get_rank() == 1:
        os._exit(3)
    time.sleep(100)


def test_a_rank_that_dies_at_once_does_not_break_a_peer_that_still_connects(ranks):
    ranks(connect_in_two_parts, 2)
    with pytest.raises(RankError) as caught:
        ranks(die_at_once, 2)
    assert list(caught.value.errors) == [1]


def leave():
    sys.exit("enough")


def test_sys_exit_on_a_rank_is_a_failure(ranks):
    with pytest.raises(RankError, match="SystemExit: enough"):
        ranks(leave, 1)


def unpicklable():
    return threading.Lock()


def test_a_result_that_cannot_travel_is_a_failure_of_its_rank(ranks):
    with pytest.raises(RankError, match="rank 0: TypeError: cannot pickle"):
        ranks(unpicklable, 1)


def die_later():
    threading.Timer(0.5, os.abort).start()


def test_a_death_between_two_calls_is_reported_by_the_next(ranks):
    ranks(die_later, 1)
    time.sleep(1.5)
    with pytest.warns(RuntimeWarning, match="ended between calls, with status -6"):
        ranks(healthy, 1)
