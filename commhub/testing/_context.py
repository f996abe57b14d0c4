"""Who am I: what a function that runs on a rank can ask, with or without a process group."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING

import attrs

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

HOST = "127.0.0.1"
_PATIENCE = timedelta(hours=1)  # the pool's own timeout comes first, and shows the stacks


@attrs.define(kw_only=True)
class Rank:
    """The rank that this process plays in the present call."""

    rank: int
    world_size: int
    port: int
    prefix: str
    _store: Store | None = attrs.field(default=None, init=False, repr=False)

    @property
    def store(self) -> Store:
        """A key-value store that the ranks of this call share, and no other call."""
        if self._store is None:
            self._store = self.connect("user")
        return self._store

    def connect(self, name: str) -> Store:
        """A new connection to the part ``name`` of this call's store."""
        from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

        # A client of its own per use: one TCPStore client serves one waiting thread at a time.
        client = TCPStore(HOST, self.port, is_master=False, wait_for_workers=False, timeout=_PATIENCE)
        return PrefixStore(f"{self.prefix}/{name}", client)

    def meet(self, store: Store, place: str) -> None:
        """Wait until every rank came to this ``place``."""
        if store.add(f"at {place}", 1) == self.world_size:
            store.set(f"all at {place}", "")
        store.wait([f"all at {place}"])


_current: Rank | None = None


def current() -> Rank:
    """The rank that this process plays.

    Raises:
        RuntimeError: outside a call of the pool.
    """
    if _current is None:
        raise RuntimeError("current() belongs in a function that RankPool.run runs on a rank")
    return _current


def set_current(rank: Rank | None) -> None:
    """Say who this process is, for the harness only."""
    global _current
    _current = rank


_hosted: list[Store] = []


def host_store() -> int:
    """Keep a store in this process, for all calls of a session, and return its port.

    The system chose the port, so none is taken twice; as under torchrun, no rank's end takes it along.
    """
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    store = TCPStore(HOST, 0, is_master=True, wait_for_workers=False)
    _hosted.append(store)
    return int(store.port)
