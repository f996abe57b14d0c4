"""Swaps, loads and registrations between backwards whose gradients are held back or not reduced, and slow shards."""

import time

import pytest
import torch.distributed as dist

import commhub
from commhub.training._elsewhere import Elsewhere

from .sharding import EVERY, Loop, gradients, loss_of, mesh, parameters, same, sharded

TIMEOUT = 30.0
HOOK = "powersgd(rank=2, start_step=0)"


def hold(model, mode, back):
    """Hold gradients back from now on, or no more: before they are reduced over the shards, or after."""
    for module in (model, *model.blocks):
        if mode == "not reduced":
            module.set_requires_gradient_sync(not back)
        else:
            module.set_requires_all_reduce(not back)


def between(mode, call, folder):
    """Two backwards of one step with a call between them, twice; and native HSDP, without the call."""
    on, found = mesh(), []
    for native in (True, False):
        model, registration = sharded(on, "allreduce", native=native, register={"timeout": TIMEOUT})
        loop, seen = Loop(model), []
        loop.run(1)
        if not native:
            registration.save(folder)
        for step in (1, 2):
            hold(model, mode, True)
            loss_of(model, 2 * step).backward()
            hold(model, mode, False)
            if not native and call == "swap":
                registration.swap("fp16")
                registration.swap("allreduce")
            elif not native and call == "load":
                registration.load(folder)
            elif not native and call == "register":
                registration = commhub.register(model, "allreduce", process_group=on["replicate"], timeout=TIMEOUT)
            loss_of(model, 2 * step + 1).backward()
            seen.append(gradients(model))
            loop.optimizer.step()
            loop.optimizer.zero_grad()
        found.append([*seen, parameters(model)])
    return same(*found), registration.step


@pytest.mark.parametrize("mode", ["not reduced", "held back"])
@pytest.mark.parametrize("call", ["load", *["swap", "register"] * EVERY])
def test_what_backwards_before_a_call_left_is_sent_with_the_next_one_after_it(ranks, tmp_path, mode, call):
    steps = {"load": 2, "swap": 3, "register": 1}[call]
    assert ranks(between, 4, mode, call, str(tmp_path)) == [(True, steps)] * 4


def slowly(seconds, shard):
    """A schedule's swaps, where the ranks of one shard are late at the end of each step and at each swap."""
    on = mesh()
    model, registration = sharded(on, "allreduce", register={"timeout": TIMEOUT})
    registration.schedule({1: HOOK, 2: "fp16", 3: HOOK})
    telling, swap = Elsewhere.told, registration.swap
    if dist.get_rank() % 2 == shard:

        def told(self, *arguments):
            time.sleep(seconds)
            return telling(self, *arguments)

        def late(text):
            time.sleep(seconds)
            swap(text)

        Elsewhere.told, registration.swap = told, late
    try:
        seen, loop = [], Loop(model)
        found = []
        for _ in range(4):
            found += loop.run(1)
            seen.append(registration.name)
    finally:
        Elsewhere.told = telling
    return seen, found, registration.step


@pytest.mark.parametrize("shard", [1, *[0] * EVERY])
def test_a_schedule_swaps_at_the_same_step_where_the_ranks_of_one_shard_are_slow(ranks, shard):
    quick, slow = ranks(slowly, 4, 0.0, shard), ranks(slowly, 4, 0.15, shard)
    for (names, expected, steps), (same_names, found, same_steps) in zip(quick, slow, strict=True):
        assert names == same_names == ["powersgd", "fp16", "powersgd", "powersgd"]
        assert steps == same_steps == 4
        assert same(expected, found)
