"""What ends a collective of Gloo's that nobody waits for: the way that this version of torch is known to obey."""

import os
import signal
import threading
import time
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

import commhub
from commhub.drivers._gloo import GlooCommunicator
from commhub.testing import current


def job(kind, tensor, p, group=None):
    return SimpleNamespace(kind=kind, payload=tensor, p=p, group=group, src=0)


def stopped_midway(kind, way):
    """Rank 0 stops rank 1 in the middle of a collective with four more behind it, gives up, and lets it go on."""
    rank, world, hub = dist.get_rank(), dist.get_world_size(), current().store
    hub.set(f"pid {rank}", str(os.getpid()))
    victim = int(hub.get("pid 1"))
    communicator = GlooCommunicator(dist.PrefixStore("abort", hub), rank, world, 60.0)
    group = next(iter(communicator.connect([list(range(world))]))) if way == "subgroup" else None
    tensors = [torch.full((6_000_000,), float(rank + 1))] + [torch.full((50_000,), float(rank + 1)) for _ in range(4)]
    kinds = [kind, commhub.AllReduce, commhub.AllGather, commhub.AllToAll, commhub.AllReduce]
    tensors = [t[: t.numel() // world * world] for t in tensors]
    dist.barrier()
    flights = [communicator.launch(job(k, t, world, group)) for k, t in zip(kinds, tensors, strict=True)]
    touched = [t for flight in flights for piece in flight.pieces for t in (piece.out, piece.kept)]
    told = None
    if rank == 0:
        if kind is commhub.AllReduce:
            some = tensors[0][::4096]
            while not (some != 1.0).any() and not flights[0].is_done():
                pass
        os.kill(victim, signal.SIGSTOP)
        time.sleep(0.05)
        midway = not all(flight.is_done() for flight in flights)
        began = time.monotonic()
        ended = communicator.abort(3.0)
        seconds = time.monotonic() - began
        left = [t.clone() for t in touched]
        os.kill(victim, signal.SIGCONT)
        time.sleep(0.3)
        changed = sum(int((t != old).sum()) for t, old in zip(touched, left, strict=True))
        told = midway, ended, seconds, changed
        hub.set("given up", "")
    else:
        hub.wait(["given up"])
        assert communicator.abort(3.0)
    began = time.monotonic()
    communicator.close()
    del communicator, flights
    closing = time.monotonic() - began
    assert closing < 1.0, closing
    assert sum(t.name == "commhub" for t in threading.enumerate()) == 0
    return told


@pytest.mark.parametrize("way", ["all", "subgroup"])
@pytest.mark.parametrize("kind", [commhub.AllReduce, commhub.AllGather, commhub.AllToAll])
def test_a_collective_that_was_aborted_has_ended_and_changes_nothing_later(ranks, kind, way):
    midway, ended, seconds, changed = ranks(stopped_midway, 3 if way == "subgroup" else 2, kind, way)[0]
    assert midway
    assert ended
    assert changed == 0
    assert seconds < 1.0
