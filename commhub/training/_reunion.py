"""What a step that failed leaves different on the ranks, and how the next hook puts them back on one state.

A step may have ended well on one rank and not on another: the last word of a round never reaches everyone for certain.
So parameters that were moved since, or averaged, may differ, and nothing would ever make them the same again.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import attrs
import torch

from commhub._errors import HookError
from commhub.training.averaging._optimizers import is_sharded
from commhub.training.steps._between import Between

from ._elsewhere import Elsewhere
from ._handing import Handed, Mean, StateHanded
from ._trained import Trained

if TYPE_CHECKING:
    from commhub.training.steps._engine import Engine

    from ._session import Session

logger = logging.getLogger("commhub")


@attrs.frozen(eq=False)
class Reunion:
    """The ranks' words about the former hook, exchanged by the next one.

    Attributes:
        session, former: the next and the former hook at work.
        steps: how many steps have ended on each rank.
        failed: whether the former hook has failed on any rank, or left one behind.
    """

    session: Session
    former: Session
    steps: tuple[int, ...]
    failed: bool

    @classmethod
    def of(cls, session: Session, former: Session) -> Reunion:
        """Meet; collective."""
        engine, size = session.engine, session.engine.world_size
        told = torch.zeros(2 * size, dtype=torch.float64, device=session.target.device)
        told[engine.rank] = former.engine.step
        told[size + engine.rank] = float(former.engine.has_failed or former.engine.in_doubt)
        counts = engine.sum(told, counted=False).tolist()
        steps = tuple(map(int, counts[:size]))
        failed = any(counts[size:]) or len(set(steps)) > 1
        if former.timetable is not None and session.target.others is not None:  # they average together, or none does
            failure = HookError(f"{former} has failed") if failed else None
            failed = bool(Elsewhere(session.target).told(failure)[0]) or failed
        return cls(session, former, steps, failed)

    @property
    def step(self) -> int:
        """How many steps count: as many as have ended on any rank."""
        return max(self.steps)

    def part(self) -> None:
        """Settle with the former hook what has become of its last step. An averager leaves its last average."""
        engine = self.former.engine
        if self.failed:
            engine.settle(engine.step < self.step)
        timetable = self.former.timetable
        if timetable is None:
            return
        failure = None if self.failed else timetable.synchronize()
        apart = torch.tensor([float(self.failed or failure is not None)], device=self.session.target.device)
        if float(self.session.engine.sum(apart, counted=False)):
            self._bring_together(self._mean())

    def end(self) -> None:
        """Have all ranks on one state, where the former hook has failed and was to keep them so; collective."""
        spec = self.former.chosen.spec
        if self.session.target.scatters:  # each rank has shards of its own, which nobody can hand to it
            ahead = [str(rank) for rank, step in enumerate(self.steps) if step == self.step]
            if len(ahead) < len(self.steps) and self.session.engine.rank == 0:
                logger.warning(
                    "after a step that failed, the shards are of different steps: it ended well on ranks %s alone. "
                    "Load a checkpoint.",
                    ", ".join(ahead),
                )
        elif self.failed and self.former.timetable is None and getattr(spec, "agrees", True):
            self._bring_together(self._handed())

    def _bring_together(self, failure: HookError | None) -> None:
        engine: Engine = self.session.engine
        if failure is not None:
            engine.step -= self.step - self.former.engine.step  # so that the next to come knows who is ahead
            logger.warning("after a failure the parameters may differ between ranks, and still do: %s", failure)

    def _mean(self) -> HookError | None:
        trained = self._trained()
        try:
            return self._between().tell(Mean(trained.parts()), self.session.target.device, topic="mean")
        finally:
            trained.written()

    def _handed(self) -> HookError | None:
        """Every rank takes what the first of those has that are ahead."""
        source, target, between = self.steps.index(self.step), self.session.target, self._between()
        trained = self._trained()
        parameters = trained.look()
        handed = Handed(source, parameters)
        try:
            failure = between.tell(handed, target.device, topic="handed")
        finally:
            trained.written()
        if failure is None:
            optimizers = [o for o in target.optimizers or self.former.target.optimizers if not is_sharded(o)]
            state = StateHanded(source, parameters, optimizers)
            failure = between.tell(state, target.device, topic="handed state")
        if failure is None and between.engine.rank != source and handed.changed:
            logger.warning(
                "rank %d: after a step that failed, %d of %d parameters differed from those of rank %d, and are the "
                "same now%s",
                between.engine.rank,
                handed.changed,
                len(parameters),
                source,
                "." if optimizers else ", but the state of an optimizer may differ: give optimizer= to register().",
            )
        return failure

    def _trained(self) -> Trained:
        target = self.session.target
        return Trained(target.module, target.kept, target.written)

    def _between(self) -> Between:
        return Between(self.session.engine, self.step)
