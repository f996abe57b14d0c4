"""Several threads of one process may find, describe, make, simulate and register hooks at the same time."""

import importlib
import os
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import commhub
from commhub.registry import _enum, _registry

THREADS = 6
ROUNDS = 60 if os.environ.get("COMMHUB_EVERY_CHECK") else 6


def at_once(*functions):
    """Call the functions in threads of their own, all from one moment on; raises what any of them raised."""
    barrier = threading.Barrier(len(functions))

    def call(function):
        barrier.wait()
        return function()

    with ThreadPoolExecutor(len(functions)) as pool:
        return [future.result() for future in [pool.submit(call, function) for function in functions]]


@pytest.fixture
def _restless():
    """Threads take turns as often as possible."""
    former = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(former)


def one_at_a_time(function):
    """The function, which fails as Python's own does now and then if two threads call it at the same time."""
    busy = threading.Lock()

    def call():
        if not busy.acquire(blocking=False):
            raise KeyError("two at once")
        try:
            time.sleep(0.001)
            function()
        finally:
            busy.release()

    return call


SPEC = """
from commhub import HookSpec, hookimpl
from pathlib import Path
import time

with open({note!r}, "a") as note:
    note.write("x")
time.sleep(0.01)
{then}

@hookimpl
def commhub_hooks():
    return [HookSpec(name="{name}", summary="One.", factory="commhub_{name}._hook:Plain")]
"""
SOURCE = """
class Plain:
    def reduce(self, bucket):
        from commhub import AllReduce
        bucket.flat.copy_((yield AllReduce(bucket.flat)))
"""


@pytest.mark.usefixtures("_restless")
def test_what_is_installed_is_found_by_many_threads_from_a_cold_cache(temporary_plugin, monkeypatch):
    monkeypatch.setattr("importlib.invalidate_caches", one_at_a_time(importlib.invalidate_caches))
    temporary_plugin("commhub-foo", hooks={"foo": "Plain"}, source=SOURCE)
    for _ in range(ROUNDS):
        _registry.refresh()
        rows, once_more, info, kinds, chosen, simulated = at_once(
            commhub.installed,
            lambda: (_registry.refresh(), commhub.installed())[1],
            lambda: (_registry.refresh(), commhub.info("foo"))[1],
            lambda: (_registry.refresh(), commhub.HookType)[1],
            lambda: (_registry.refresh(), commhub.create("foo"))[1],
            lambda: commhub.simulate("foo", [[torch.ones(2)], [torch.zeros(2)]]).gradients[0][0].tolist(),
        )
        assert rows == once_more
        assert info in rows
        assert kinds("foo") is kinds.FOO
        assert chosen is not None
        assert simulated == [0.5, 0.5]


@pytest.mark.usefixtures("_restless")
@pytest.mark.parametrize("then", ["", "raise ZeroDivisionError('planned')"], ids=["whole", "broken"])
def test_many_threads_that_need_one_plugin_load_it_once(temporary_plugin, tmp_path, then):
    note = tmp_path / "note"
    spec = SPEC.format(note=str(note), then=then, name="foo")
    temporary_plugin("commhub-foo", hooks={"foo": "Plain"}, source=SOURCE, spec=spec)
    rows = at_once(*[lambda: commhub.info("foo")] * THREADS)
    assert note.read_text() == "x"
    assert {row.status for row in rows} == {"broken" if then else "ok"}
    assert len({id(row.spec) for row in rows}) == 1


def test_many_threads_that_ask_for_the_enum_first_get_one_class(monkeypatch):
    members = _enum._members
    monkeypatch.setattr(_enum, "_members", lambda names: time.sleep(0.02) or members(names))
    monkeypatch.setattr(_enum, "_built", {})
    assert len(set(at_once(*[lambda: commhub.HookType] * THREADS))) == 1


def add_one(x):
    x.add_(1)


def test_many_threads_that_warm_one_kernel_compile_it_once(monkeypatch):
    monkeypatch.setenv("COMMHUB_COMPILE", "1")
    kernel = commhub.toolkit.Kernel(add_one)
    made = []

    def compiler(function, backend):
        made.append(function)
        threading.Event().wait(0.02)
        return function

    monkeypatch.setattr(torch, "compile", compiler)
    at_once(*[lambda: kernel.warm(torch.ones(4, 2), elements=8)] * THREADS)
    assert len(made) == 1


class Plain:
    def reduce(self, bucket):
        bucket.flat.copy_((yield commhub.AllReduce(bucket.flat)))


def train_in_threads(rounds):
    """Six threads, each with a group of both ranks of its own; the groups are made beforehand, in one order."""
    groups = [dist.new_group([0, 1]) for _ in range(THREADS)]
    ours = dist.get_rank() + 1.0

    def train(group, hook):
        model = DistributedDataParallel(torch.nn.Linear(4, 1, bias=False), process_group=group)
        registration = commhub.register(model, hook, timeout=30)
        model(torch.full((1, 4), ours)).sum().backward()
        found = model.module.weight.grad.clone()
        registration.swap("allreduce")
        return found

    for _ in range(rounds):
        _registry.refresh()
        hooks = ["allreduce", "fp16", "bf16", "allreduce(wire=fp16)", "allreduce", Plain()]
        for found in at_once(*[lambda g=g, h=h: train(g, h) for g, h in zip(groups, hooks, strict=True)]):
            assert torch.equal(found, torch.full((1, 4), 1.5))


def test_threads_register_at_once_each_on_a_group_of_its_own(ranks):
    ranks(train_in_threads, 2, 20 if ROUNDS > 10 else 1, timeout=200)


def share_an_object_between_threads():
    group = dist.new_group([dist.get_rank()], use_local_synchronization=True)
    hook = Plain()

    def take():
        model = DistributedDataParallel(torch.nn.Linear(4, 4), process_group=group)
        try:
            return commhub.register(model, hook)
        except commhub.RegistrationError as error:
            return str(error)

    return [type(one).__name__ if not isinstance(one, str) else one for one in at_once(take, take, take)]


def test_threads_that_register_one_object_at_once_do_not_both_get_it(ranks):
    for told in ranks(share_an_object_between_threads, 1):
        assert told.count("Registration") == 1
        assert sum("at work already" in one for one in told) == 2
