"""A fault after a bucket's last collective, when the peers need nothing more of the rank that has it."""

import os
import time

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import commhub
from commhub import AllReduce
from commhub.testing import Branches, assert_equal_across_ranks

PLAIN, UNUSED, STATIC = {}, {"find_unused_parameters": True}, {"static_graph": True}


class Late:
    """Fails on rank 1 with its last result in hand."""

    def __init__(self, step, silent):
        self.step, self.silent = step, silent

    def reduce(self, bucket):
        if not self.silent:
            bucket.flat.copy_((yield AllReduce(bucket.flat)))
        if bucket.step == self.step and bucket.rank == 1:
            raise ZeroDivisionError("planned")
        if self.silent:
            return
            yield


def late(mode, cap, step, silent=False):
    torch.manual_seed(0)
    model = DistributedDataParallel(Branches(8), bucket_cap_mb=cap, **mode)
    registration = commhub.register(model, Late(step, silent), timeout=20)
    began, failed = time.monotonic(), []
    for now in range(step + 4):
        model.zero_grad()
        try:
            model(torch.ones(1, 8) + dist.get_rank(), both=not mode).sum().backward()
        except commhub.HookError as error:
            failed.append((now, str(error)))
            registration.swap("allreduce")
    assert_equal_across_ranks([p.grad for p in model.parameters() if p.grad is not None])
    return failed, time.monotonic() - began, registration.step


@pytest.mark.parametrize("nproc", [2, 3, 4] if os.environ.get("COMMHUB_EVERY_CHECK") else [3])
@pytest.mark.parametrize("cap", [25, 0.0001], ids=["one bucket", "many buckets"])
@pytest.mark.parametrize("mode", [PLAIN, UNUSED, STATIC], ids=["plain", "find_unused", "static_graph"])
@pytest.mark.parametrize("step", [0, 2])
def test_all_ranks_raise_in_the_same_step_and_training_goes_on(ranks, nproc, cap, mode, step):
    for rank, (failed, seconds, steps) in enumerate(ranks(late, nproc, mode, cap, step, timeout=60)):
        [(when, text)] = failed
        assert when == step
        assert text.endswith("ZeroDivisionError: planned")
        assert ("rank 1 failed" in text) == (rank != 1)
        assert steps == step + 3
        assert seconds < 15


def test_ranks_that_send_nothing_hear_of_it_too(ranks):
    for failed, _, _ in ranks(late, 2, PLAIN, 25, 1, True):
        [(when, text)] = failed
        assert (when, text.endswith("planned")) == (1, True)


def counted(hook):
    model = DistributedDataParallel(torch.nn.Linear(8, 8))
    registration = commhub.register(model, hook)
    for _ in range(3):
        model(torch.ones(1, 8)).sum().backward()
    return registration.stats.sent_bytes, registration.stats.logical_bytes


def test_hearing_that_the_step_ended_well_is_not_counted_as_the_hooks_bytes(ranks):
    assert ranks(counted, 2, "allreduce") == [(3 * 72 * 4.0, 3 * 72 * 4.0)] * 2
    assert ranks(counted, 2, "noop") == [(0.0, 3 * 72 * 4.0)] * 2
