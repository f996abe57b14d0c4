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
    2. From then on they are averaged among the ranks of one host, or not at all.
    3. After every ``period``-th step from ``start_step`` on, once the optimizer has used the gradients, parameters are
       averaged over all ranks.

    Args:
        start_step: steps of plain training first. The paper starts where the learning rate first drops.
        period: steps between two averages of the parameters; ``None`` is 8, or what the averager says.
        local_gradients: average gradients within a host; otherwise every rank keeps its own.
        averager: a hook string of another averager. Its warm-up is ``start_step`` unless it says otherwise.
        buffers, optimizer_state: average these too; with an averager, options of its own.
    """

    start_step: int = attrs.field(default=1000)
    period: int | None = None
    local_gradients: bool = True
    averager: str | None = None
    buffers: bool = False
    optimizer_state: bool = False
    _averager: Averager = attrs.field(init=False, repr=False, eq=False)
    _host: Subgroup | None = attrs.field(default=None, init=False, repr=False, eq=False)
    _apart: bool = attrs.field(default=False, init=False, repr=False, eq=False)

    @start_step.validator
    def _is_step(self, _field: attrs.Attribute[int], value: object) -> None:
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise ValueError(f"start_step is {value!r}; give a number of steps, 0 or more.")

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
        """Find the ranks on this host, and put the averager on its timetable."""
        hosts = [[r for r, host in enumerate(setup.hosts) if host == one] for one in sorted(set(setup.hosts))]
        self._apart = not self.local_gradients or all(len(ranks) == 1 for ranks in hosts)
        if not self._apart:
            self._host = setup.partition(hosts)
            if len(hosts) == 1 and setup.rank == 0:
                logger.warning(
                    "post_local_sgd: all ranks are on one host, so that every step averages among all of them and "
                    "nothing is saved. local_gradients=false makes the steps local."
                )
        setup.average(self._averager)

    def reduce(self, bucket: Bucket) -> Exchange:
        """Average over all ranks, later over this host's."""
        if bucket.step < self.start_step:
            bucket.flat.copy_((yield AllReduce(bucket.flat)))
        elif not self._apart:
            bucket.flat.copy_((yield AllReduce(bucket.flat, group=self._host)))
