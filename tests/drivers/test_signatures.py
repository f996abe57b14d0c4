"""Ranks that ask for different collectives: one error on each of them, where Gloo alone would end the process."""

import os
import time

import pytest
import torch
import torch.distributed as dist

import commhub
from commhub import AllGather, AllReduce
from commhub.testing import assert_equal_across_ranks

from .models import backward, build

EVERYTHING = bool(os.environ.get("COMMHUB_EVERY_CHECK"))


class Sends:
    """Averages; from ``step`` on, ``ranks`` send something else in one bucket and stage."""

    def __init__(self, what, ranks, step=3, place=0):
        self.what, self.ranks, self.step, self.place = what, ranks, step, place

    def reduce(self, bucket):
        odd = bucket.step >= self.step and bucket.rank in self.ranks and bucket.index == self.place
        mean = (yield AllReduce(bucket.flat)).clone()
        if odd and self.what == "fewer stages":
            bucket.flat.copy_(mean)
            return
        if odd and self.what == "another dtype":
            second = (yield AllReduce(mean.double())).float()
        elif odd and self.what == "another kind":
            second = (yield AllGather(mean))[: mean.numel()]
        else:
            extra = {"more": 5000, "less": -20}.get(self.what, 0) if odd else 0
            sent = torch.cat([mean, mean.new_zeros(extra)]) if extra >= 0 else mean[:extra].clone()
            second = torch.cat([(yield AllReduce(sent)), mean])[: mean.numel()]
        if odd and self.what == "more stages":
            yield AllReduce(torch.zeros(7))
        bucket.flat.copy_(second)


def go_on(model, registration):
    registration.swap("allreduce")
    for step in range(3):
        backward(model, 50 + step)
    grads = [p.grad for p in model.parameters()]
    assert_equal_across_ranks(grads)
    assert all(g.isfinite().all() for g in grads)


def differ(cases):
    """Per case: the step that failed and how, with how long that took; training goes on after a swap."""
    told = []
    for what, ranks, step, buckets, place in cases:
        model = build(buckets)
        registration = commhub.register(model, Sends(what, ranks, step, place), timeout=20)
        failed = None
        for at in range(6):
            began = time.monotonic()
            try:
                backward(model, at)
            except commhub.HookError as error:
                failed = at, str(error), time.monotonic() - began
                break
        go_on(model, registration)
        told.append(failed)
    return told


WHAT = ["more", "less", "another dtype", "another kind", "more stages", "fewer stages"]


@pytest.mark.parametrize("nproc", [2, 3, 4])
def test_a_rank_that_alone_asks_for_something_else_is_an_error_on_all_ranks(ranks, nproc):
    where = ((0, 1, 0), (3, 12, 11), (2, 12, 5))
    cases = [
        (what, [odd], *where[(n + odd + nproc) % 3])
        for n, what in enumerate(WHAT)
        for odd in (0, nproc - 1)
        if EVERYTHING or (n % 3 == nproc - 2 and (n + odd) % 2)
    ]
    for rank, told in enumerate(ranks(differ, nproc, cases, timeout=100)):
        for (what, [odd], step, *_), failed in zip(cases, told, strict=True):
            assert failed is not None, (what, odd, step)
            at, text, seconds = failed
            assert at == step, (rank, what, odd, text)
            assert "asks for" in text, (rank, what, odd, text)
            assert f"rank {odd} " in text, (rank, what, odd, text)
            assert seconds < 10, (rank, what, odd, seconds)


class Ops:
    """Counts what a store is asked."""

    def __init__(self, signatures):
        self.asked = []
        store = signatures.store
        for name in ("add", "set", "check"):
            self._count(store, name)

        class Counting:
            def __getattr__(_, name):
                if name in ("add", "set", "get", "check", "delete_key"):
                    self.asked.append(name)
                return getattr(store, name)

        signatures.store = Counting()

    def _count(self, store, name):
        assert callable(getattr(store, name))


def all_change(step, buckets):
    model = build(buckets)
    registration = commhub.register(model, Sends("more", range(dist.get_world_size()), step), timeout=20)
    ops = Ops(registration._session.engine.driver._watch.signatures)
    counts = []
    for at in range(step + 3):
        before = len(ops.asked)
        backward(model, at)
        counts.append(len(ops.asked) - before)
    assert_equal_across_ranks([p.grad for p in model.parameters()])
    return counts


@pytest.mark.parametrize("buckets", [1, 12])
@pytest.mark.parametrize("nproc", [2, 4])
def test_what_all_ranks_change_together_is_no_error_and_what_they_do_not_change_asks_nothing(ranks, nproc, buckets):
    for counts in ranks(all_change, nproc, 4, buckets, timeout=60):
        assert counts[0] > 0
        assert counts[2:] == [0, 0, counts[4], 0, 0]
        assert counts[4] > 0
