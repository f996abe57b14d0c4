"""Faults of the link, injected by a wrapper around the communicator: each ends as it should, on every rank."""

import os
import time

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import commhub
from commhub.testing import assert_equal_across_ranks, bitwise_equal
from commhub.testing._faults import Corrupt, Failed, Late, Lost, faults

EVERYTHING = bool(os.environ.get("COMMHUB_EVERY_CHECK"))
AT = 2
"""Of one bucket, that of the second step: each step confirms with a collective of its own."""


def build():
    torch.manual_seed(0)
    return DistributedDataParallel(torch.nn.Linear(6, 3, bias=False))


def step(model):
    """One backward of a batch of this rank's own; the gradient's difference from the mean that it should be."""
    rank, p = dist.get_rank(), dist.get_world_size()
    own = torch.arange(6.0) + rank
    model.zero_grad()
    model(own).sum().backward()
    mean = torch.stack([torch.arange(6.0) + r for r in range(p)]).mean(0).expand(3, 6)
    return model.module.weight.grad - mean


def with_fault(fault, within=20, steps=2, network=None, on=(0,)):
    """Steps with the fault on some ranks; this rank's error, and seconds and wrong elements of its last step."""
    model, rank = build(), dist.get_rank()
    with faults({AT: fault} if rank in on else {}) as made:
        registration = commhub.register(model, "allreduce", timeout=within if rank in on else 20)
    registration.emulate(network)
    error, wrong = None, None
    for _ in range(steps):
        began = time.monotonic()
        try:
            wrong = step(model).abs().gt(1e-5).flatten().tolist()
        except commhub.HookError as raised:
            error = raised
    seconds = time.monotonic() - began
    assert made[0].launched >= AT + 1
    registration.swap("allreduce")
    assert step(model).abs().max() < 1e-5
    assert_equal_across_ranks([model.module.weight.grad])
    told = None if error is None else (type(error).__name__, str(error), type(error.__cause__).__name__)
    return told, seconds, wrong


@pytest.mark.parametrize("nproc", [2, *([4] if EVERYTHING else [])])
class TestOnRealRanks:
    def test_a_late_collective_gives_the_right_numbers_late(self, ranks, nproc):
        network = commhub.Network(latency=0.01)  # over an emulated network the fault is there too
        for told, seconds, wrong in ranks(with_fault, nproc, Late(0.2), network=network):
            assert told is None
            assert not any(wrong)
            assert 0.2 <= seconds < 2

    def test_a_lost_collective_is_a_timeout_where_it_was_lost_and_told_to_the_peers(self, ranks, nproc):
        (told, seconds, _), *peers = ranks(with_fault, nproc, Lost(), within=0.5)
        assert told[0] == "HookTimeoutError"
        assert "rank 0: AllReduce did not end within 0.5 s" in told[1]
        where = "ranks 1-3" if nproc == 4 else "rank 1"
        behind = f"rank 0 is behind: it waits for AllReduce 1 of bucket 0 in step 1, which has ended on {where}; there "
        ahead = "AllReduce of commhub's own in step 1 is awaited"
        assert told[1].endswith(f"{behind}{ahead}.")
        assert 0.5 <= seconds < 2
        for told, seconds, _ in peers:
            assert "rank 0 failed: " in told[1]
            assert told[1].endswith(f"AllReduce did not end within 0.5 s; {behind}{ahead}.")
            assert seconds < 3

    def test_of_a_collective_that_has_ended_nowhere_the_place_is_told_and_nobody_is_blamed(self, ranks, nproc):
        for told, _, _ in ranks(with_fault, nproc, Lost(), within=0.5, on=range(nproc)):
            place = "AllReduce 1 of bucket 0 in step 1 has begun on all ranks and ended on none"
            assert told[1].endswith(f"{place}: a message between them is late or lost.")
            assert "behind" not in told[1]

    def test_a_failed_collective_is_one_error_with_its_text_on_every_rank(self, ranks, nproc):
        (told, _, _), *peers = ranks(with_fault, nproc, Failed("the cable was cut"))
        assert told == ("HookError", told[1], "RuntimeError")
        assert told[1].endswith("rank 0: the hook raised RuntimeError: the cable was cut")
        for (name, text, _), seconds, _ in peers:
            assert (name, "rank 0 failed: " in text, "the cable was cut" in text) == ("HookError", True, True)
            assert seconds < 3

    def test_a_corrupt_collective_changes_the_numbers_of_its_rank_alone(self, ranks, nproc):
        (told, _, wrong), *peers = ranks(with_fault, nproc, Corrupt(byte=7, bits=0x80))
        assert told is None
        assert wrong == [i == 1 for i in range(18)]  # the eighth byte is of the second element
        for told, _, wrong in peers:
            assert told is None
            assert not any(wrong)


def gloo_is_gone():
    began = time.monotonic()
    (name, text, cause), _, _ = with_fault(Failed("[gloo/transport/tcp/pair.cc] Connection closed by peer"))
    return name, text, cause, time.monotonic() - began


def test_a_connection_that_is_lost_though_every_rank_answers_is_told_as_that(ranks):
    (name, text, cause, seconds), peer = ranks(gloo_is_gone, 2)
    assert (name, cause) == ("HookError", "RuntimeError")
    for told in (text, peer[1]):
        assert "rank 0 lost a connection, and every rank answers: RuntimeError: [gloo" in told
        assert "the hook raised" not in told
    assert seconds < 6


def test_a_hook_is_sent_what_came_corrupt():
    class Bare:
        rank, size = 0, 2

        def launch(self, job):
            return self

        def result(self):
            return torch.ones(3, dtype=torch.float16)

    result = Corrupt(byte=1, bits=0x80).launch(Bare(), None).result()
    assert bitwise_equal(result, torch.tensor([-1.0, 1.0, 1.0], dtype=torch.float16))
