"""Hooks that follow one another leave no connection and no thread behind."""

import gc
import os
import resource
import weakref
from pathlib import Path

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

import commhub
from commhub.testing import mlp

EVERY = "COMMHUB_EVERY_CHECK" in os.environ
TIMES = 1000 if EVERY else 30
SPARE = 12
"""Descriptors that may be open beside those after the first rounds, such as a connection being closed."""


def figures():
    gc.collect()
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task")), resident


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
            if number in (3, TIMES // 2, TIMES - 1):
                told.append(figures())
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    return told


@pytest.mark.parametrize(
    ("change", "nproc"),
    [(swap, 3), (remove_and_register, 2), *([(swap, 2), (remove_and_register, 3)] if EVERY else [])],
)
def test_descriptors_and_threads_are_as_many_after_many_hooks(ranks, change, nproc):
    for (files, threads, _), half, end in ranks(repeated, nproc, change, timeout=500, fresh=True):
        assert end[0] <= files + SPARE // 2
        assert end[1] <= threads + 1
        if EVERY:
            assert end[2] - half[2] < 4 * 2**20


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
