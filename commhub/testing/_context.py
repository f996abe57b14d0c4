"""Who am I: what a function that runs on a rank can ask, with or without a process group."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING

import attrs

if TYPE_CHECKING:
    import torch.distributed as dist


@attrs.define(kw_only=True)
class Rank:
    """The rank that this process plays in the present call."""

    rank: int
    world_size: int
    host: str
    port: int
    prefix: str
    _store: dist.Store | None = attrs.field(default=None, init=False, repr=False)

    @property
    def store(self) -> dist.Store:
        """A key-value store that the ranks of this call share, and no other call."""
        if self._store is None:
            self._store = self.connect("user")
        return self._store

    def connect(self, name: str) -> dist.Store:
        """A new connection to the part `name` of this call's store."""
        import torch.distributed as dist

        # A client of its own per use: one TCPStore client serves one waiting thread at a time.
        client = dist.TCPStore(
            self.host, self.port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=60)
        )
        return dist.PrefixStore(f"{self.prefix}/{name}", client)


_current: Rank | None = None


def current() -> Rank:
    """The rank that this process plays; RuntimeError outside a call of the pool."""
    if _current is None:
        raise RuntimeError("current() belongs in a function that RankPool.run runs on a rank")
    return _current


def set_current(rank: Rank | None) -> None:
    """Say who this process is, for the harness only."""
    global _current
    _current = rank
