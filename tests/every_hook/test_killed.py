"""A rank that is killed in a step: its peers say so, within the timeout, whatever they were waiting for."""

import os
import signal
import time

import pytest
import torch.distributed as dist

import commhub

from .matrix import BUCKETS, HOOKS, build, collectives, drawn, feeds_back, give, name_of, register

TIMEOUT = 20.0

# What a rank is waiting for when a peer dies is up to the exchange, not to what is in it; processes are dear. So one
# hook stands for all with a single collective, and one for all with several that build on one another and on state.
EXCHANGES = {
    "one collective": next(hook for hook in HOOKS if collectives(hook) == 1),
    "several collectives": next(hook for hook in HOOKS if collectives(hook) > 1 and feeds_back(hook)),
}


def die_in_a_step(hook, cap):
    rank, last = dist.get_rank(), dist.get_world_size() - 1
    model, registration = build(hook, cap)
    registration = register(model, hook, timeout=TIMEOUT)
    kind = type(registration.hook)
    whole = kind.reduce

    def killed(self, bucket):
        exchange = whole(self, bucket)
        request = next(exchange)
        if bucket.step == 3 and bucket.index == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        while True:
            answer = yield request
            try:
                request = exchange.send(answer)
            except StopIteration:
                return

    if rank == last:
        kind.reduce = killed
    for step in range(3):
        give(model, drawn(rank, step))
    began = time.monotonic()
    try:
        give(model, drawn(rank, 3))
    except commhub.HookError as error:
        return str(error), time.monotonic() - began
    return "no error", 0.0


PLACES = [  # for each kind of exchange and each number of ranks, one of the two sizes of buckets
    ("one collective", 2, "one bucket"),
    ("one collective", 4, "many buckets"),
    ("several collectives", 2, "many buckets"),
    ("several collectives", 4, "one bucket"),
]


@pytest.mark.parametrize(("exchange", "nproc", "buckets"), PLACES)
def test_the_peers_of_a_killed_rank_raise_within_the_timeout(ranks, exchange, nproc, buckets):
    hook = EXCHANGES[exchange]
    *peers, last = ranks.fresh(die_in_a_step, nproc, hook, BUCKETS[buckets], timeout=60, grace=40)
    assert last.exitcode == -signal.SIGKILL
    for rank, peer in enumerate(peers):
        assert peer.error is None, peer.error
        text, seconds = peer.value
        assert name_of(hook) in text, text
        assert f"rank {rank}" in text, text
        assert seconds < TIMEOUT + 5, f"rank {rank} took {seconds:.1f} s"
