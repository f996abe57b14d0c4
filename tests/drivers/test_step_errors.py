"""What goes wrong in a step: one clear error on every rank, no hang, and training that goes on after a swap."""

import time

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import commhub
from commhub.testing import assert_equal_across_ranks


class Faulty:
    """Averages, and misbehaves in one place at one step on the ranks that are named."""

    def __init__(self, fault, ranks, step=1, bucket=0):
        self.fault, self.ranks, self.step, self.bucket = fault, ranks, step, bucket

    def reduce(self, bucket):
        at = bucket.step == self.step and bucket.index == self.bucket and bucket.rank in self.ranks
        if at and self.fault == "raise_before":
            raise ZeroDivisionError("planned")
        if at and self.fault == "yield_nonsense":
            yield "an average, please"
        if at and self.fault == "yield_wrong_device":
            yield commhub.AllReduce(torch.empty(3, device="meta"))
        if at and self.fault == "yield_strided":
            yield commhub.AllReduce(torch.zeros(4, 4).t())
        mean = yield commhub.AllReduce(bucket.flat)
        if at and self.fault == "raise_after":
            raise ZeroDivisionError("planned")
        if at and self.fault == "wrong_dtype":
            bucket.flat = mean.double()
            return
        if at and self.fault == "wrong_shape":
            bucket.flat = mean[:-1]
            return
        second = yield commhub.AllReduce(mean)
        bucket.flat.copy_(second)


class ReturnsNothing:
    def __init__(self, ranks):
        self.ranks = ranks

    def prepare(self, setup):
        self.broken = setup.rank in self.ranks

    def reduce(self, bucket):
        return None if self.broken else self.average(bucket)

    def average(self, bucket):
        yield commhub.AllReduce(bucket.flat)


def make(kind):
    torch.manual_seed(0)
    layers = [torch.nn.Linear(16, 16) for _ in range(6)]
    return DistributedDataParallel(
        torch.nn.Sequential(*layers),
        bucket_cap_mb=0.002,
        static_graph=kind == "static",
        find_unused_parameters=kind == "unused",
    )


def backward(model, rank, step):
    x = torch.randn(4, 16, generator=torch.Generator().manual_seed(100 * step + rank))
    model.zero_grad()
    model(x).pow(2).mean().backward()


def fail_then_go_on(kind, fault, ranks, step):
    """Train until the hook fails, swap to a good one, and train on."""
    rank = dist.get_rank()
    model = make(kind)
    hook = ReturnsNothing(ranks) if fault == "return_nothing" else Faulty(fault, ranks, step)
    registration = commhub.register(model, hook, timeout=30)
    told, began = None, None
    for at in range(8):
        began = time.monotonic()
        try:
            backward(model, rank, at)
        except commhub.HookError as error:
            told = (str(error), type(error.__cause__).__name__, time.monotonic() - began)
            break
    registration.swap("allreduce")
    for at in range(3):
        backward(model, rank, 50 + at)
    grads = [p.grad for p in model.parameters()]
    assert_equal_across_ranks(grads)
    assert all(g.isfinite().all() for g in grads)
    return told


FAULTS = [
    "raise_before",
    "raise_after",
    "yield_nonsense",
    "yield_wrong_device",
    "yield_strided",
    "wrong_dtype",
    "wrong_shape",
    "return_nothing",
]
TEXTS = {
    "raise_before": "ZeroDivisionError: planned",
    "raise_after": "ZeroDivisionError: planned",
    "yield_nonsense": "yielded str",
    "yield_wrong_device": "on meta",
    "yield_strided": "not contiguous",
    "wrong_dtype": "returned float64 for float32. Cast it back.",
    "wrong_shape": "left shape",
    "return_nothing": "reduce() returned NoneType",
}


@pytest.mark.parametrize("kind", ["plain", "unused", "static"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_on_one_rank_is_raised_on_both_and_training_goes_on_after_a_swap(ranks, kind, fault):
    step = 0 if kind == "static" else 1
    first, second = ranks(fail_then_go_on, 2, kind, fault, [1], step, timeout=60)
    text, cause, seconds = second
    assert TEXTS[fault] in text
    assert "rank 1" in text
    if fault in ("raise_before", "raise_after"):
        assert cause == "ZeroDivisionError"
    text, _, seconds = first
    assert "rank 1 failed" in text
    assert TEXTS[fault] in text
    assert seconds < 20


@pytest.mark.parametrize("kind", ["plain", "unused", "static"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_on_every_rank_is_raised_on_every_rank_as_its_own(ranks, kind, fault):
    for text, _, _ in ranks(fail_then_go_on, 2, kind, fault, [0, 1], 0, timeout=60):
        assert TEXTS[fault] in text


def fail_again_without_swap():
    model = make("plain")
    commhub.register(model, Faulty("raise_before", [0, 1]), timeout=30)
    texts = []
    for at in range(4):
        try:
            backward(model, dist.get_rank(), at)
        except commhub.HookError as error:
            texts.append(str(error))
    commhub.register(model, "allreduce")
    backward(model, dist.get_rank(), 9)
    assert_equal_across_ranks([p.grad for p in model.parameters()])
    return texts


def test_after_an_error_each_step_says_so_again_until_a_hook_is_registered(ranks):
    for texts in ranks(fail_again_without_swap, 2, timeout=60):
        assert len(texts) == 3
        assert all("ZeroDivisionError: planned" in text for text in texts)


def fail_in_the_last_bucket():
    model = make("plain")
    registration = commhub.register(model, Faulty("raise_after", [2], step=3, bucket=2), timeout=30)
    told = None
    try:
        for at in range(6):
            backward(model, dist.get_rank(), at)
    except commhub.HookError as error:
        told = str(error)
    registration.swap("fp16")
    for at in range(3):
        backward(model, dist.get_rank(), 20 + at)
    assert_equal_across_ranks([p.grad for p in model.parameters()])
    return told


def test_four_ranks_survive_a_fault_on_one_of_them(ranks):
    told = ranks(fail_in_the_last_bucket, 4, timeout=60)
    assert all("rank 2" in text and "planned" in text for text in told)
