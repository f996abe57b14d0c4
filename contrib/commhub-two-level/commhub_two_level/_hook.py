"""Two levels: exact and dense within a host, whatever hook between hosts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs
import torch

import commhub
from commhub import AllReduce

from ._shares import Hosts

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from commhub import Bucket, Collective, Exchange, Setup


@attrs.define
class TwoLevel:
    """Average within each host, then between hosts with a hook by name (hierarchical all-reduce, arXiv 1807.11205).

    1. The ranks of a host sum their gradients: one dense all-reduce over the fast link.
    2. Each host is one rank of the inner hook. All its ranks run that hook, on the same numbers and with the same
       state; of every collective that it asks for, each sends a share to the ranks in its place on the other hosts.
    3. The shares' results are gathered within the host, and the inner hook goes on.

    So the inner hook sees whole parameters, and a link between two hosts carries its bytes once, spread over the
    host's ranks. Ranks end with the same bits.

    Args:
        inner: a hook string.
        ranks_per_host: take so many consecutive ranks as one host; ``None``: as they were found.

    Raises:
        HookOptionError: at registration, if ``inner`` is an averager or brings one, or makes subgroups of its own.
    """

    inner: str = "fp16"
    ranks_per_host: int | None = attrs.field(default=None, validator=attrs.validators.optional(attrs.validators.ge(1)))
    _inner: Any = attrs.field(init=False, repr=False, eq=False)
    _hosts: Hosts | None = attrs.field(default=None, init=False, repr=False, eq=False)
    _reduce: Callable[[Bucket], Exchange] | None = attrs.field(default=None, init=False, repr=False, eq=False)
    _some_unused: bool = attrs.field(default=False, init=False, repr=False, eq=False)

    def __attrs_post_init__(self) -> None:
        self._inner = commhub.create(self.inner)
        if callable(getattr(self._inner, "due", None)):
            raise ValueError(f"inner is {self.inner!r}, which averages parameters. Name a hook such as 'fp16'.")

    def prepare(self, setup: Setup) -> None:
        """Find the hosts; prepare the inner hook as one of them."""
        per = self.ranks_per_host
        found = setup.hosts if per is None else tuple(rank // per for rank in range(setup.world_size))
        hosts = [[rank for rank, host in enumerate(found) if host == one] for one in sorted(set(found))]
        self._hosts = None
        if len(hosts) == 1:
            self._reduce = _dense
        elif len(hosts) == setup.world_size:
            self._inner.prepare(setup)
            self._reduce = self._inner.reduce
        else:
            self._hosts = Hosts(setup, hosts)
            self._some_unused = setup.unused
            self._inner.prepare(self._as_host(setup))
            self._reduce = self._two_levels

    def _as_host(self, setup: Setup) -> Setup:
        assert self._hosts is not None
        inner = self.inner

        def refuse(_asked: object) -> Any:
            raise commhub.HookOptionError(
                f"two_level: inner is {inner!r}, which makes subgroups or averages parameters. Name a hook that "
                "averages gradients among all ranks."
            )

        return attrs.evolve(
            setup,
            rank=self._hosts.mine,
            world_size=self._hosts.count,
            hosts=tuple(range(self._hosts.count)),
            connect=refuse,
            average=refuse,
            ranks=None,
        )

    def reduce(self, bucket: Bucket) -> Exchange:
        """Leave the mean over all ranks in ``bucket.flat``."""
        assert self._reduce is not None
        yield from self._reduce(bucket)

    def _two_levels(self, bucket: Bucket) -> Exchange:
        hosts = self._hosts
        assert hosts is not None
        finite = bucket.finite  # what one host alone knows is not equal on all ranks
        # 1. Within the host. Hosts may have more or fewer ranks: the mean over hosts of these is that over all ranks.
        bucket.flat.mul_(hosts.count / bucket.divisor)
        asked = [AllReduce(bucket.flat, op="sum", group=hosts.host)]
        if self._some_unused:
            flags = torch.tensor([float(flag) for flag in bucket.used], device=bucket.flat.device)
            asked.append(AllReduce(flags, op="sum", group=hosts.host))
        summed, *used = yield tuple(asked)
        bucket.flat.copy_(summed)
        bucket.finite = finite
        bucket.overlook()
        # 2. Between hosts: the same bucket, of one rank for each host.
        virtual = attrs.evolve(
            bucket,
            rank=hosts.mine,
            world_size=hosts.count,
            divisor=hosts.count,
            group=None,
            used=tuple(flag > 0 for flag in used[0].tolist()) if used else bucket.used,
        )
        yield from _shared_out(self._inner.reduce(virtual), virtual, hosts)
        bucket.flat = virtual.flat


def _dense(bucket: Bucket) -> Exchange:
    bucket.flat.copy_((yield AllReduce(bucket.flat)))


def _shared_out(exchange: Exchange, bucket: Bucket, hosts: Hosts) -> Exchange:
    """The inner hook's exchange, with each of its collectives among hosts shared out among their ranks."""
    return commhub.relay(exchange, lambda asked: _one_stage(asked, bucket, hosts))


def _one_stage(asked: Sequence[Collective], bucket: Bucket, hosts: Hosts) -> Any:
    finite = bucket.finite
    shares = [hosts.share(one) for one in asked]
    parts = yield tuple(share.between() for share in shares)
    gathered = yield tuple(share.within(part) for share, part in zip(shares, parts, strict=True))
    results = tuple(share.whole(tensor) for share, tensor in zip(shares, gathered, strict=True))
    # The core has looked at this rank's shares alone; all ranks hold the whole.
    bucket.finite = finite
    for one, result in zip(asked, results, strict=True):
        if one.alike and (result.is_floating_point() or result.is_complex()):
            bucket.finite = bucket.finite & torch.isfinite(result.sum())
        else:
            bucket.overlook()
    return results
