"""One rank of a cell: who it is, its model, and the place where the fault strikes."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from typing import TYPE_CHECKING, Any

import attrs
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from commhub.testing import current

if TYPE_CHECKING:
    from pathlib import Path

    import commhub
    from commhub.testing._faults import Faulty

    from ._faults import Fault

BUCKETS, ELEMENTS = 3, 20_000
LEARNING_RATE = 0.1
PATIENT = 30.0
"""Seconds that ranks wait for one another where nothing is wrong."""


class Given(torch.nn.Module):
    """Parameters whose gradients are those that ``forward`` is given."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = torch.nn.ParameterList(torch.zeros(ELEMENTS) for _ in range(BUCKETS))

    def forward(self, gradients: list[torch.Tensor]) -> torch.Tensor:
        return sum((w * g).sum() for w, g in zip(self.weights, gradients, strict=True))


def drawn(rank: int, step: int) -> list[torch.Tensor]:
    """Gradients, different on each rank and in each step."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    return [torch.randn(ELEMENTS, generator=generator) for _ in range(BUCKETS)]


@attrs.define(eq=False, kw_only=True)
class Here:
    """What a rank of a cell has.

    Attributes:
        rank, size: of it.
        victim: the rank that the fault strikes.
        fault, place: which, and where.
        folder: that all ranks see.
        keeper: the process that holds the group's store, where that is none of the ranks.
        went_on: set when the fault is over on this rank; ``over`` says since when.
        last: the number of the last step.
        link: collectives of the victim that go wrong, by number; see ``commhub.testing._faults``.
    """

    rank: int
    size: int
    victim: int
    fault: Fault
    place: str
    folder: Path
    keeper: int = 0
    model: Any = None
    registration: commhub.Registration | None = None
    optimizer: torch.optim.Optimizer | None = None
    went_on: threading.Event = attrs.Factory(threading.Event)
    over: float | None = None
    last: int = -1
    link: dict[int, Any] = attrs.Factory(dict)
    communicators: list[Faulty] = attrs.Factory(list)
    _armed: bool = False

    @property
    def is_victim(self) -> bool:
        return self.rank == self.victim

    @property
    def hook(self) -> str:
        """What the rank registers or swaps to in the end."""
        return "allreduce(wire=bf16)" if self.is_victim and self.fault.symmetric else "allreduce"

    def arm(self, launch: int | None) -> None:
        """From now on the fault strikes, or hits the collective that this rank launches after so many others."""
        self._armed = self.is_victim and self.fault.strike is not None
        if self.is_victim and self.fault.link is not None:
            (communicator,) = self.communicators
            self.link[communicator.launched + launch] = self.fault.link

    def at(self, place: str, value: Any = None) -> Any:
        """The fault strikes here, if it is to; the value, or what the fault makes of it."""
        if not self._armed or place != self.place:
            return value
        self._armed = False
        try:
            return self.fault.strike(self, value)
        finally:
            self.over = time.monotonic()
            self.went_on.set()

    def meet(self, place: str) -> None:
        """Wait for all ranks, over a store that no fault reaches."""
        current().meet(current().store, place)

    def ended(self, place: str, *, absent: int = 0) -> None:
        """Wait for all that are left, but for so many; who is stopped goes on when all others have come."""
        hub, left = current().store, self.size - self.fault.kills - absent
        came = int(hub.add(place, 1))
        if self.fault.stops and not self.is_victim and came == self.size - 1:
            os.kill(int(hub.get(f"process {self.victim}")), signal.SIGCONT)
        while int(hub.add(place, 0)) < left:
            time.sleep(0.01)

    def join(self) -> None:
        """Make the process group. Rank 0 holds its store, or, where that is to be lost, a process that is no rank."""
        hub, master = current().store, self.rank == 0
        if master and self.fault.ends_the_store:
            port, self.keeper = serve()
            master = False
        elif master:
            store = dist.TCPStore("127.0.0.1", 0, self.size, is_master=True, wait_for_workers=False)
            port = store.port
        hub.set(f"process {self.rank}", str(os.getpid()))
        if self.rank == 0:
            hub.set("where", f"{port} {self.keeper}")
        port, self.keeper = map(int, hub.get("where").split())
        if not master:
            store = dist.TCPStore("127.0.0.1", port, self.size, is_master=False, wait_for_workers=False)
        dist.init_process_group("gloo", store=store, rank=self.rank, world_size=self.size)
        self.meet("joined")

    def build(self) -> None:
        self.model = DistributedDataParallel(Given(), bucket_cap_mb=1e-6)

    def backward(self, step: int) -> None:
        self.last = step
        self.model.zero_grad()
        self.model(drawn(self.rank, step)).backward()

    def gradients(self) -> list[torch.Tensor]:
        return [weight.grad.clone() for weight in self.model.module.weights]


def serve() -> tuple[int, int]:
    """A store in a process of its own: its port and process."""
    reading, writing = os.pipe()
    pid = os.fork()  # nothing has started threads here yet
    if pid == 0:
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        os.write(writing, str(store.port).encode())
        with contextlib.suppress(KeyboardInterrupt):
            signal.pause()
        os._exit(0)
    port = int(os.read(reading, 20))
    os.close(reading)
    os.close(writing)
    return port, pid
