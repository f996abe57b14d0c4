"""A collective that is given up writes into nothing that is used later: neither gradients nor a hook's own memory."""

import os
import signal
import threading
import time

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import commhub
from commhub.testing import current

TIMEOUT = 0.8


def stop_when_changed(flat, hub, name, pid):
    """Stop a process in the middle of what it sends: when Gloo has changed a part of ``flat`` and not yet all."""
    some = flat[:: max(1, flat.numel() // 1500)]
    before = some.clone()

    def watch():
        end = time.monotonic() + 5
        while not (some != before).any() and time.monotonic() < end:
            pass
        os.kill(pid, signal.SIGSTOP)
        hub.set(name, "")

    threading.Thread(target=watch, daemon=True).start()


class Watched:
    """Averages, and tells when the step's first collective is on its way."""

    def __init__(self, on_its_way):
        self.on_its_way = on_its_way
        self.flats = []

    def reduce(self, bucket):
        self.flats.append(bucket.flat)
        self.on_its_way(bucket)
        bucket.flat.copy_((yield commhub.AllReduce(bucket.flat)))


def build(elements, buckets, **mode):
    layers = [torch.nn.Linear(elements // buckets, 1, bias=False) for _ in range(buckets)]
    net = torch.nn.ModuleList(layers)
    for layer in layers:
        torch.nn.init.zeros_(layer.weight)

    class Sum(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x):
            return sum(layer(x.expand(layer.in_features)) for layer in self.net)

    cap = 4 * elements / buckets / 2**20
    return DistributedDataParallel(Sum(), bucket_cap_mb=cap, **mode)


def backward(model, value):
    model.zero_grad()
    model(torch.full((1,), float(value))).sum().backward()


def wrong(model, value):
    return sum(int((p.grad != value).sum()) for p in model.parameters())


def interrupted(elements, buckets, mode, rounds):
    """Rank 0 stops rank 1 in the middle of an exchange, gives up and lets it go on; all register again and go on."""
    rank, world, hub = dist.get_rank(), dist.get_world_size(), current().store
    hub.set(f"pid {rank}", str(os.getpid()))
    victim = int(hub.get("pid 1"))
    found, seconds, again = [], [], []
    for number in range(rounds):
        model = build(elements, buckets, **mode)
        for _ in range(2):  # buckets are rebuilt after the first step
            backward(model, rank + 1)

        def on_its_way(bucket, number=number):
            if rank == 0 and bucket.index == number % buckets:
                stop_when_changed(bucket.flat, hub, f"stopped {number}", victim)

        hook = Watched(on_its_way)
        registration = commhub.register(model, hook, timeout=30)
        registration._session.engine.driver._watch.timeout = TIMEOUT  # of a step, not of registering
        began = time.monotonic()
        failure = None
        try:
            backward(model, 1001 + rank)
        except commhub.HookError as error:
            failure = error
        if rank == 0:
            hub.wait([f"stopped {number}"])
            seconds.append(time.monotonic() - began)
        left = [flat.clone() for flat in hook.flats]
        if rank == 0:
            os.kill(victim, signal.SIGCONT)
        time.sleep(0.1)
        later = sum(int((flat != old).sum()) for flat, old in zip(hook.flats, left, strict=True))
        began = time.monotonic()
        commhub.register(model, "allreduce", timeout=30)
        backward(model, rank + 1)
        again.append(time.monotonic() - began)
        found.append((type(failure).__name__, later, wrong(model, (world + 1) / 2)))
        dist.barrier()
    return found, seconds, again


COPIED, VIEWS = {}, {"gradient_as_bucket_view": True}
ROUNDS, CASES = 1, [(2, 1, VIEWS), (3, 12, COPIED)]
if os.environ.get("COMMHUB_EVERY_CHECK"):
    ROUNDS, CASES = 5, [(n, buckets, mode) for n in (2, 3, 4) for buckets in (1, 12) for mode in (COPIED, VIEWS)]


@pytest.mark.parametrize(
    ("nproc", "buckets", "mode"),
    CASES,
    ids=lambda value: ("views" if value else "copied") if isinstance(value, dict) else None,
)
def test_a_collective_that_timed_out_writes_nothing_into_the_next_steps_gradients(ranks, nproc, buckets, mode):
    results = ranks(interrupted, nproc, 6_000_000, buckets, mode, ROUNDS, timeout=100)
    for rank, (found, _, _) in enumerate(results):
        assert [(later, count) for _, later, count in found] == [(0, 0)] * ROUNDS
        assert rank > 0 or "HookTimeoutError" in [kind for kind, _, _ in found] or nproc > 2
