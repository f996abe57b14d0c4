"""Hooks that follow one another leave no connection and no thread behind."""

import gc
import os
import resource
import time
import weakref
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import commhub
from commhub.testing import current, mlp

EVERY = "COMMHUB_EVERY_CHECK" in os.environ
TIMES = 1000 if EVERY else 30
SPARE = 12
"""Descriptors that may be open beside those after the first rounds, such as a connection being closed."""


def figures():
    """Descriptors, threads, and bytes of memory of this process's own, swapped out or not.

    What is mapped from files comes and goes as the system likes.
    """
    gc.collect()
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    own = sum(int(status[name].split()[0]) * 1024 for name in ("RssAnon", "VmSwap"))
    return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task")), own


def swap(registration, model):
    registration.swap("fp16")
    return registration


def remove_and_register(registration, model):
    registration.remove()
    return commhub.register(model, "fp16")


def repeated(change):
    model = DistributedDataParallel(mlp())
    registration = commhub.register(model, "allreduce")
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    told = []
    try:
        for number in range(TIMES):
            if number == 3:
                highest = max(map(int, os.listdir("/proc/self/fd")))
                resource.setrlimit(resource.RLIMIT_NOFILE, (highest + SPARE, limits[1]))
            registration = change(registration, model)
            model(torch.ones(2, 8)).sum().backward()
            if number in (3, TIMES // 4, TIMES // 2, 3 * TIMES // 4, TIMES - 1):
                told.append(figures())
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    return told


@pytest.mark.parametrize(
    ("change", "nproc"),
    [(swap, 3), (remove_and_register, 2), *([(swap, 2), (remove_and_register, 3)] if EVERY else [])],
)
def test_descriptors_and_threads_are_as_many_after_many_hooks(ranks, change, nproc):
    for told in ranks(repeated, nproc, change, timeout=500, fresh=True):
        (files, threads, _), end = told[0], told[-1]
        assert end[0] <= files + SPARE // 2
        assert end[1] <= threads + 1
        if EVERY:  # what leaks grows in every quarter; the allocator takes more once, in one of them
            assert min(later[2] - before[2] for before, later in pairwise(told)) < 2 * 2**20


def made_and_dropped():
    """Descriptors and threads after the first models that came and went, and after the last."""
    told = []
    for number in range(TIMES):
        model = DistributedDataParallel(mlp())
        commhub.register(model, "fp16")
        model(torch.ones(2, 8)).sum().backward()
        del model
        gc.collect()
        if number in (9, TIMES - 1):
            told.append(figures())
    return told


def test_descriptors_and_threads_are_as_many_after_many_models(ranks):
    for (files, threads, _), end in ranks(made_and_dropped, 2, timeout=500, fresh=True):
        assert end[0] <= files + SPARE
        assert end[1] <= threads + 1


def captured(hook, how):
    """Whether a model is freed that a user's hook on its optimizer refers to."""
    model = DistributedDataParallel(mlp())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.register_step_post_hook(lambda *_, model=model: None)
    registration = commhub.register(model, hook, optimizer=optimizer)
    for _ in range(2):
        model(torch.ones(2, 8)).sum().backward()
        if not hook.startswith("optimizer"):
            optimizer.step()
    if how == "removed":
        registration.remove()
    elif how == "swapped":
        registration.swap("fp16")
    kept, held = weakref.ref(model), weakref.ref(optimizer)
    del model, registration, optimizer
    gc.collect()
    return kept() is None and held() is None


@pytest.mark.parametrize("how", ["dropped", "removed", "swapped"])
@pytest.mark.parametrize("hook", ["allreduce", "periodic(period=1)", "optimizer_overlap"])
def test_a_model_is_freed_that_a_hook_on_its_optimizer_refers_to(ranks, hook, how):
    assert ranks(captured, 2, hook, how) == [True, True]


class FailsOnRank0:
    def reduce(self, bucket):
        if bucket.rank == 0:
            raise ValueError("planned")
        yield commhub.AllReduce(bucket.flat)


def at_rest():
    """Descriptors once they are no longer becoming fewer: the store's holder closes its ends of connections late."""
    counted = [figures()[0]]
    while len(counted) < 10 or counted[-1] < counted[-10]:
        time.sleep(0.1)
        counted.append(figures()[0])
    return counted[-1]


def failed_steps(store):
    """Descriptors after steps that failed, each mended by a swap; rank 0 holds the store, as with ``torchrun``."""
    rank = current().rank
    if rank == 0:
        held = dist.TCPStore("127.0.0.1", 0, 3, is_master=True, wait_for_workers=False)
        store.write_text(str(held.port))
    while not (store.exists() and store.read_text()):
        time.sleep(0.01)
    joined = held if rank == 0 else dist.TCPStore("127.0.0.1", int(store.read_text()), 3, wait_for_workers=False)
    dist.init_process_group("gloo", store=joined, rank=rank, world_size=3)
    model = DistributedDataParallel(mlp())
    registration = commhub.register(model, "allreduce")
    told = []
    for number in range(60 if EVERY else 9):
        registration.swap(FailsOnRank0())
        with pytest.raises(commhub.HookError, match="planned"):
            model(torch.ones(2, 8)).sum().backward()
        registration.swap("fp16")
        model(torch.ones(2, 8)).sum().backward()
        if number == 2:
            told.append(at_rest())
    told.append(at_rest())
    dist.barrier()
    dist.destroy_process_group()
    return told


def test_descriptors_are_as_many_after_many_failed_steps(ranks, tmp_path):
    for before, after in ranks(failed_steps, 3, tmp_path / "port", init=False, fresh=True, timeout=300):
        assert after <= before + 3
