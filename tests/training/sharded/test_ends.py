"""The end of a step between replicas, which ranks of all shards tell each other: interruptions, late ranks, errors."""

import time

import pytest
import torch
import torch.distributed as dist
from torch import nn

import commhub
from commhub.training._elsewhere import Elsewhere
from commhub.training.steps._engine import Engine

from .sharding import EVERY, Loop, Transformer, error_of, loss_of, mesh, same, shard, sharded

TIMEOUT = 3.0


def raised(action):
    """What a call raises, a Ctrl-C too, in words; and the seconds that it took."""
    began = time.monotonic()
    try:
        action()
    except BaseException as error:
        return type(error).__name__, str(error), time.monotonic() - began
    return None, "", time.monotonic() - began


def held_back_and_failing(victim):
    """On one rank alone something goes wrong in a backward that sends nothing; then a backward that sends."""
    on = mesh()
    model, registration = sharded(on, "allreduce", register={"timeout": TIMEOUT})
    loss_of(model, 0).backward()
    model.zero_grad()
    for module in (model, *model.blocks):
        module.set_requires_all_reduce(False)
    if dist.get_rank() == victim:
        model.__dict__["_commhub_slot"]._way._accumulate = lambda *_, **__: 1 / 0
    told = [raised(loss_of(model, 1).backward)]
    if dist.get_rank() == victim:
        del model.__dict__["_commhub_slot"]._way._accumulate
    for module in (model, *model.blocks):
        module.set_requires_all_reduce(True)
    told.append(raised(loss_of(model, 2).backward))
    registration.swap("fp16")
    model.zero_grad()
    loss_of(model, 3).backward()
    return told, registration.step


@pytest.mark.parametrize("victim", [0, 3])
def test_an_error_of_one_rank_where_nothing_was_to_be_sent_lets_no_later_step_pass(ranks, victim):
    results = ranks(held_back_and_failing, 4, victim)
    replica = victim // 2
    for rank, ((first, second), steps) in enumerate(results):
        assert first[0] == ("HookError" if rank // 2 == replica else None), first
        assert second[0] == "HookError"
        assert "ZeroDivisionError" in second[1]
        assert max(first[2], second[2]) < TIMEOUT
        assert steps == 2


def interrupted(victim, place):
    """A Ctrl-C on one rank at the end of its step: as it waits for its peers, or when all has been told."""
    on = mesh()
    model, _ = sharded(on, "allreduce", register={"timeout": TIMEOUT})
    loss_of(model, 0).backward()
    model.zero_grad()
    ending, telling = Engine.end, Elsewhere.told
    if dist.get_rank() == victim and place == "before":

        def end(self, **_):
            raise KeyboardInterrupt

        Engine.end = end
    elif dist.get_rank() == victim:

        def told(self, *arguments):
            telling(self, *arguments)
            raise KeyboardInterrupt

        Elsewhere.told = told
    try:
        found = raised(loss_of(model, 1).backward)
    finally:
        Engine.end, Elsewhere.told = ending, telling
    later = error_of(lambda: (model.zero_grad(), loss_of(model, 2).backward())) if place == "before" else None
    return found, later


@pytest.mark.parametrize("victim", [0, 3])
@pytest.mark.parametrize("place", ["before", "after"])
def test_a_ctrl_c_at_the_end_of_a_step_leaves_no_rank_waiting(ranks, victim, place):
    for rank, ((kind, text, seconds), later) in enumerate(ranks(interrupted, 4, victim, place)):
        assert seconds < TIMEOUT + 2, (rank, kind, text)
        if rank == victim:
            assert kind == "KeyboardInterrupt"
        elif place == "before":
            assert kind in ("HookError", "HookTimeoutError"), (rank, text)
        assert place == "after" or later[0] in ("HookError", "HookTimeoutError"), later


def late(victim):
    """One rank comes to the end of its step long after the others."""
    on = mesh()
    model, _ = sharded(on, "allreduce", register={"timeout": TIMEOUT})
    loss_of(model, 0).backward()
    telling = Elsewhere.told
    if dist.get_rank() == victim:

        def told(self, *arguments):
            time.sleep(4 * TIMEOUT)
            return telling(self, *arguments)

        Elsewhere.told = told
    try:
        return raised(loss_of(model, 1).backward)
    finally:
        Elsewhere.told = telling


def test_a_rank_whose_word_does_not_come_is_not_waited_for_longer_than_the_timeout_allows(ranks):
    for rank, (kind, text, seconds) in enumerate(ranks(late, 4, 0)):
        if rank == 1:
            assert kind == "HookError"
            assert "cannot be reached" in text
            assert 2 * TIMEOUT - 1 < seconds < 2 * TIMEOUT + 2


def with_its_optimizer():
    """A failed step, where the optimizer was given to register: its state, DTensors, is handed over too."""
    from .test_failing import Raises

    on = mesh()
    native, _ = sharded(on, native=True)
    model = shard(Transformer(), on["shard"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    registration = commhub.register(
        model, Raises(3, step=2), process_group=on["replicate"], optimizer=optimizer, timeout=20
    )
    loop, bare = Loop(model, optimizer=optimizer), Loop(native)
    assert same(loop.run(2), bare.run(2))
    error = error_of(loss_of(model, 2).backward)[0]
    model.zero_grad()
    registration.swap("allreduce")
    found = loop.run(2), bare.run(2)
    return error, same(*found)


def test_the_optimizers_state_is_the_same_after_a_failed_step(ranks):
    assert ranks(with_its_optimizer, 4) == [("HookError", True)] * 4


def differing(what):
    """One rank's model is another, or its settings are."""
    on = mesh()
    model = shard(Transformer(), on["shard"])
    if what == "factor" and dist.get_rank() >= 2:
        model.set_gradient_divide_factor(4.0)
    if what == "model" and dist.get_rank() == 3:
        model = nn.Linear(2, 2)
    return raised(lambda: commhub.register(model, "fp16", process_group=on["replicate"], timeout=TIMEOUT))


def test_settings_of_units_that_differ_are_shown(ranks):
    for kind, text, _ in ranks(differing, 4, "factor"):
        assert kind == "HookMismatchError"
        assert "4.0" in text


def test_a_rank_with_another_model_is_told_to_its_replica_at_once_and_to_all_in_time(ranks):
    results = ranks(differing, 4, "model")
    assert [r[0] for r in results] == ["RegistrationError"] * 4
    assert "Linear is no DistributedDataParallel model" in results[1][1]
    assert results[1][2] < TIMEOUT
    assert all(r[2] < 3 * TIMEOUT + 2 for r in results)


def many_times(rounds, blocks):
    """Registered, trained, swapped, trained and removed, again and again; native HSDP each time, bit by bit."""
    on = mesh(min(2, dist.get_world_size() // 2))
    native = shard(Transformer(blocks), on)
    model = shard(Transformer(blocks), on["shard"])
    loops = [Loop(one, optimizer=torch.optim.SGD(one.parameters(), lr=0.1)) for one in (model, native)]
    for _ in range(rounds):
        registration = commhub.register(model, "powersgd(start_step=1000)", process_group=on["replicate"], timeout=30)
        first = [loop.run(1) for loop in loops]
        registration.swap("allreduce")
        second = [loop.run(1) for loop in loops]
        if not (same(*first) and same(*second)):
            return False
        registration.remove()
    return True


@pytest.mark.parametrize("nproc", [2, 4] if EVERY else [4])
@pytest.mark.parametrize("blocks", [1, 11] if EVERY else [1])
def test_every_time(ranks, nproc, blocks):
    assert ranks(many_times, nproc, 30 if blocks == 1 and EVERY else 8, blocks, timeout=300) == [True] * nproc
