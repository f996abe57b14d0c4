"""A collective among hosts, carried out by all their ranks: each sends a share of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs
import torch
from torch import Tensor

from commhub import AllGather, AllReduce, Broadcast

if TYPE_CHECKING:
    from collections.abc import Sequence

    from commhub import Collective, Setup, Subgroup


class Hosts:
    """Who is on which host, and who sends for it.

    A rank's place is its number on its own host. The ranks of one place, one from each host, form a lane. There are as
    many lanes as the smallest host has ranks; further ranks of larger hosts only receive.

    Args:
        setup: what ``prepare`` got; two partitions of the ranks are made.
        ranks: per host, its ranks, ascending.
    """

    def __init__(self, setup: Setup, ranks: Sequence[Sequence[int]]) -> None:
        self.count = len(ranks)
        self.lanes = min(map(len, ranks))
        self.mine = next(host for host, some in enumerate(ranks) if setup.rank in some)
        self.place = ranks[self.mine].index(setup.rank)
        self.sends = self.place < self.lanes
        self.host = setup.partition(ranks)
        lanes = [[some[place] for some in ranks] for place in range(self.lanes)]
        apart = [[rank] for some in ranks for rank in some[self.lanes :]]
        self.lane: Subgroup | None = setup.partition([*lanes, *apart])
        members = [(some[self.place], host) for host, some in enumerate(ranks)] if self.sends else []
        self.order = [host for _, host in sorted(members)]
        """The lane's ranks ascend; which hosts they are on need not."""

    def share(self, asked: Collective) -> Share:
        """This rank's share of a collective among the hosts."""
        count = self.count
        rows = count if asked.in_shares else 1
        kept = asked.result_numel(rows, count)
        if asked.tensor.numel() % rows:
            raise ValueError(f"{type(asked).__name__} of {asked.tensor.numel()} elements among {rows} hosts.")
        return Share(hosts=self, asked=asked, rows=rows, kept=kept, columns=asked.tensor.numel() // rows)


@attrs.frozen(kw_only=True, eq=False)
class Share:
    """A block of columns of a payload that has one row, or one for each host: the same columns in every row.

    Attributes:
        hosts: among which.
        asked: the collective as the inner hook yielded it.
        rows, kept: rows of the payload and of the result.
        columns: elements of a row.
    """

    hosts: Hosts
    asked: Collective
    rows: int
    kept: int
    columns: int

    @property
    def width(self) -> int:
        """Columns of one share; the last is padded."""
        return -(-self.columns // self.hosts.lanes)

    def between(self) -> Collective:
        """What this rank asks of its lane."""
        hosts, asked = self.hosts, self.asked
        if not hosts.sends:  # it keeps in step, alone and for nothing
            return AllReduce(asked.tensor.new_zeros(1), op="sum", group=hosts.lane)
        padding = self.width * hosts.lanes - self.columns
        table = torch.nn.functional.pad(asked.tensor.reshape(self.rows, self.columns), (0, padding))
        block = table[:, hosts.place * self.width :][:, : self.width]
        if self.rows > 1:
            block = block[hosts.order]
        changes: dict[str, Any] = {"tensor": block.clone(memory_format=torch.contiguous_format).view(-1)}
        if isinstance(asked, Broadcast):
            changes["src"] = hosts.order.index(asked.src)
        return attrs.evolve(asked, group=hosts.lane, **changes)

    def within(self, result: Tensor) -> Collective:
        """What this rank asks of its host, given its lane's result."""
        hosts = self.hosts
        if not hosts.sends:
            result = self.asked.tensor.new_zeros(self.kept * self.width)
        elif self.kept > 1:
            places = [hosts.order.index(host) for host in range(hosts.count)]
            result = result.view(self.kept, self.width)[places].view(-1)
        if hosts.lanes == 1:
            return Broadcast(result, wire=self.asked.wire, group=hosts.host)
        return AllGather(result, wire=self.asked.wire, group=hosts.host)

    def whole(self, gathered: Tensor) -> Tensor:
        """What the inner hook is sent, given what the host's ranks gathered."""
        lanes = self.hosts.lanes
        blocks = gathered.view(-1, self.kept, self.width)[:lanes] if self.width else gathered.view(lanes, self.kept, 0)
        table = blocks.transpose(0, 1).reshape(self.kept, lanes * self.width)[:, : self.columns]
        if self.asked.in_place:
            return self.asked.tensor.copy_(table.reshape(self.asked.tensor.shape))
        return table.reshape(-1)
