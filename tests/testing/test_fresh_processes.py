"""Brand-new processes: their interpreters end as a script's does, and the exit is part of the result."""

import atexit
import os
import sys
import threading
import time

import pytest
import torch.distributed as dist

from commhub.testing import RankError

pytestmark = pytest.mark.filterwarnings("error")


def pid_and_rank():
    atexit.register(print, "at exit", file=sys.stderr)
    return os.getpid(), dist.get_rank()


def test_fresh_processes_are_new_each_time_and_run_their_exit_handlers(ranks):
    first, second = (ranks.fresh(pid_and_rank, 2) for _ in range(2))
    assert [r.value[1] for r in first] == [0, 1]
    assert len({r.value[0] for r in first + second}) == 4
    assert all(r.exitcode == 0 and r.error is None and "at exit" in r.stderr for r in first + second)


def end(how):
    if how == "sys.exit":
        sys.exit(3)
    if how == "raise":
        raise ValueError("no")
    if how == "abort":
        os.abort()
    return "fine"


@pytest.mark.parametrize(
    ("how", "exitcode", "error"),
    [("sys.exit", 3, "exit 3"), ("raise", 1, "ValueError"), ("abort", -6, "SIGABRT"), ("return", 0, None)],
)
def test_exit_codes_are_those_of_a_script(ranks, how, exitcode, error):
    (result,) = ranks.fresh(end, 1, how)
    assert result.exitcode == exitcode
    assert (result.error and result.error.type_name) == error
    assert result.value == ("fine" if how == "return" else None)
    assert ("ValueError: no" in result.stderr) == (how == "raise")


def abort_at_exit():
    atexit.register(os.abort)
    return "returned"


def test_a_death_at_exit_keeps_the_value_and_shows(ranks):
    (result,) = ranks.fresh(abort_at_exit, 1)
    assert (result.value, result.exitcode) == ("returned", -6)
    with pytest.raises(RankError, match="SIGABRT"):
        ranks(abort_at_exit, 1, fresh=True)


def hang_at_exit():
    threading.Thread(target=time.sleep, args=(100,)).start()


def test_a_hang_at_exit_is_ended_with_its_stacks(ranks):
    (result,) = ranks.fresh(hang_at_exit, 1, timeout=2)
    assert result.error.type_name == "TimeoutError"
    assert result.exitcode == -9


def test_run_in_fresh_processes_returns_values(ranks):
    pooled = ranks(os.getpid, 1)
    assert ranks(os.getpid, 1, fresh=True) != pooled
