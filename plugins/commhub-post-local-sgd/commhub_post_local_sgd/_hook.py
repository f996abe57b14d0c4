"""Post-local SGD: plain averages for a while, then gradients within a host and parameters now and then."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, cast

import attrs

import commhub
from commhub import AllReduce

if TYPE_CHECKING:
    from commhub import Averager, Bucket, Exchange, Setup, Subgroup

logger = logging.getLogger("commhub")


@attrs.define(kw_only=True)
class PostLocalSGD:
    """Post-local SGD (Lin et al. 2018, arXiv 1808.07217).

    1. Before ``start_step`` gradients are averaged over all ranks.
    2. From then on they are averaged within a subgroup, by default the ranks of one host, or not at all.
    3. After every ``period``-th step from ``start_step`` on, once the optimizer has used the gradients, parameters are
       averaged over all ranks.

    Args:
        start_step: steps of plain training first. The paper starts where the learning rate first drops.
        period: steps between two averages of the parameters; ``None`` is 8, or what the averager says.
        local_gradients: average gradients within a subgroup; otherwise every rank keeps its own.
        subgroup: the size of the subgroups of consecutive ranks, which divides the number of ranks; ``None``: the ranks
            of one host are one.
        averager: a hook string of another averager. Its warm-up is ``start_step`` unless it says otherwise.
        buffers, optimizer_state: average these too; with an averager, options of its own.
    """

    start_step: int = attrs.field(default=1000)
    period: int | None = None
    local_gradients: bool = True
    subgroup: int | None = attrs.field(default=None)
    averager: str | None = None
    buffers: bool = False
    optimizer_state: bool = False
    _averager: Averager = attrs.field(init=False, repr=False, eq=False)
    _subgroup: Subgroup | None = attrs.field(default=None, init=False, repr=False, eq=False)
    _apart: bool = attrs.field(default=False, init=False, repr=False, eq=False)

    @start_step.validator
    def _is_step(self, _field: attrs.Attribute[int], value: object) -> None:
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise ValueError(f"start_step is {value!r}; give a number of steps, 0 or more.")

    @subgroup.validator
    def _is_size(self, _field: attrs.Attribute[int | None], value: object) -> None:
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ValueError(f"subgroup is {value!r}; give the number of ranks in each subgroup, such as 4.")
        if value is not None and not self.local_gradients:
            raise ValueError("subgroup is given beside local_gradients=false, which averages within none.")

    def __attrs_post_init__(self) -> None:
        self._averager = self._periodic() if self.averager is None else self._named(self.averager)

    def _periodic(self) -> Averager:
        made = commhub.create(
            "periodic",
            **({} if self.period is None else {"period": self.period}),
            warmup_steps=self.start_step,
            buffers=self.buffers,
            optimizer_state=self.optimizer_state,
        )
        return cast("Averager", made)

    def _named(self, averager: str) -> Averager:
        given = {"period": self.period is not None, "buffers": self.buffers, "optimizer_state": self.optimizer_state}
        twice = [name for name, is_given in given.items() if is_given]
        if twice:
            raise ValueError(f"{twice[0]} is given beside averager={averager!r}, which decides it. Write it in there.")
        try:
            made = commhub.create(averager, warmup_steps=self.start_step)
        except commhub.HookOptionError:
            made = commhub.create(averager)  # it says otherwise, has no warm-up, or this tells what is wrong
        if not callable(getattr(made, "due", None)):
            raise ValueError(f"averager is {averager!r}, which averages gradients. Name one such as 'periodic'.")
        return cast("Averager", made)

    def prepare(self, setup: Setup) -> None:
        """Make the subgroups, and put the averager on its timetable.

        Raises:
            HookOptionError: if ``subgroup`` does not divide the number of ranks.
        """
        groups = self._groups(setup)
        self._apart = not self.local_gradients or all(len(ranks) == 1 for ranks in groups)
        if not self._apart:
            self._subgroup = setup.partition(groups)
            if len(groups) == 1 and setup.rank == 0:
                where = "on one host" if self.subgroup is None else "in one subgroup"
                logger.warning(
                    f"post_local_sgd: all ranks are {where}, so that every step averages among all of them and "
                    "nothing is saved. local_gradients=false makes the steps local."
                )
        setup.average(self._averager)

    def _groups(self, setup: Setup) -> list[list[int]]:
        size, ranks = self.subgroup, range(setup.world_size)
        if size is None:
            return [[r for r in ranks if setup.hosts[r] == host] for host in sorted(set(setup.hosts))]
        if setup.world_size % size:
            raise commhub.HookOptionError(
                f"subgroup is {size}, and {setup.world_size} ranks are not made of groups of {size}."
            )
        return [list(ranks[start : start + size]) for start in ranks[::size]]

    def reduce(self, bucket: Bucket) -> Exchange:
        """Average over all ranks, later over this rank's subgroup."""
        if bucket.step < self.start_step:
            bucket.flat.copy_((yield AllReduce(bucket.flat)))
        elif not self._apart:
            bucket.flat.copy_((yield AllReduce(bucket.flat, group=self._subgroup)))
