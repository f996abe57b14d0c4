"""Processes that end at a bad moment: nothing hangs, nothing aborts."""

import os
import signal
import sys
import time

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import commhub


class TwoSteps:
    def reduce(self, bucket):
        mean = yield commhub.AllReduce(bucket.flat)
        bucket.flat.copy_((yield commhub.AllReduce(mean)))


def make(hook, timeout=20):
    torch.manual_seed(0)
    layers = [torch.nn.Linear(64, 64) for _ in range(12)]
    model = DistributedDataParallel(torch.nn.Sequential(*layers), bucket_cap_mb=0.015)
    return model, commhub.register(model, hook, timeout=timeout)


def backward(model):
    model(torch.randn(4, 64)).sum().backward()


def die_in_a_step(victim):
    model, _ = make(TwoSteps())
    for _ in range(3):
        backward(model)
    if dist.get_rank() == victim:
        os.kill(os.getpid(), signal.SIGKILL)
    began = time.monotonic()
    try:
        for _ in range(3):
            backward(model)
    except commhub.HookError as error:
        return str(error), time.monotonic() - began
    return "no error", 0.0


@pytest.mark.parametrize("victim", [0, 3])  # of two ranks and of three, and at other moments, in tests/faults
def test_a_killed_rank_is_reported_by_the_others_within_the_timeout(ranks, victim):
    results = ranks.fresh(die_in_a_step, 4, victim, timeout=60, grace=40)
    for rank, result in enumerate(results):
        if rank == victim:
            assert result.exitcode == -signal.SIGKILL
        else:
            assert result.error is None, result.error
            text, seconds = result.value
            assert "TwoSteps" in text
            assert f"rank {rank}" in text
            assert seconds < 25


class Stuck:
    """Leaves a step under way: rank 1 never sends its part."""

    def reduce(self, bucket):
        if bucket.rank == 1 and bucket.step == 2:
            time.sleep(1000)
        bucket.flat.copy_((yield commhub.AllReduce(bucket.flat)))


_kept = []  # as a script's globals are: only the interpreter's end lets go of them


def exit_in_a_step(how):
    model, registration = make(Stuck() if how == "stuck" else TwoSteps(), timeout=600)
    _kept.extend([model, registration])
    for _ in range(2):
        backward(model)
    if how == "idle":
        return
    engine = registration._session.engine
    engine.begin()
    flats = [torch.ones(2_000_000) for _ in range(6)]
    if how != "alone" or dist.get_rank() == 0:
        for flat in flats:
            engine.add(flat, (), (), (), lambda: None)
    if how == "stuck" and dist.get_rank() == 1:
        os._exit(0)
    if how == "raise":
        raise SystemExit(0)
    time.sleep(0.005)


TIMES = {"busy": 3, "idle": 1, "alone": 2, "stuck": 1, "raise": 1}
if os.environ.get("COMMHUB_EVERY_CHECK"):
    TIMES = {"busy": 13, "idle": 4, "alone": 4, "stuck": 2, "raise": 4}


@pytest.mark.parametrize("how", TIMES)
def test_a_process_exits_cleanly_while_a_step_is_under_way(ranks, how):
    for _ in range(TIMES[how]):
        began = time.monotonic()
        for result in ranks.fresh(exit_in_a_step, 2, how, timeout=60, grace=40):
            assert result.exitcode == 0, result.stderr
            assert "Fatal" not in result.stderr
            assert "terminate called" not in result.stderr
        assert time.monotonic() - began < 40


def fork_a_child():
    model, registration = make(TwoSteps())
    backward(model)
    pid = os.fork()
    if pid == 0:
        registration._session.engine.driver.close()
        sys.stdout.flush()
        os._exit(7)
    _, status = os.waitpid(pid, 0)
    backward(model)
    return os.waitstatus_to_exitcode(status)


def test_a_forked_child_leaves_the_parents_thread_and_group_alone(ranks):
    for result in ranks.fresh(fork_a_child, 2, timeout=60):
        assert result.error is None, result.error
        assert result.value == 7


def drop_the_model():
    import gc
    import threading

    def threads():
        gc.collect()
        return sum(t.name == "commhub" for t in threading.enumerate())

    before = threads()
    model, _ = make("allreduce")
    backward(model)
    during = threads()
    del model, _
    return during - before, threads() - before


def test_dropping_the_model_ends_its_thread(ranks):
    assert ranks(drop_the_model, 2, timeout=60) == [(1, 0), (1, 0)]
