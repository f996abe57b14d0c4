"""What ranks reduce between an engine's steps: parameters, and words."""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs
import torch

from commhub.protocol._nesting import Confined

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch import Tensor

    from commhub._errors import HookError
    from commhub.protocol._bucket import Bucket
    from commhub.protocol._collectives import Subgroup
    from commhub.protocol._hook import Hook
    from commhub.protocol._spans import Span

    from ._engine import Elsewhere, Engine

    Round = tuple[Hook, Iterable[Bucket], Tensor | None]


@attrs.define(eq=False)
class Between:
    """Rounds of a group between two steps. What hooks remember in ``reduce`` counts when ``end`` says so.

    Attributes:
        engine: whose steps.
        step: the number of the step that these follow, for buckets and errors.
        group: ``None`` is all ranks.
    """

    engine: Engine
    step: int
    group: Subgroup | None = None
    _finite: bool = attrs.field(init=False, default=True)

    @property
    def ranks(self) -> Sequence[int]:
        """The group's ranks, in order."""
        return range(self.engine.world_size) if self.group is None else self.group.ranks

    @property
    def is_whole(self) -> bool:
        """Whether the group is all ranks."""
        return len(self.ranks) == self.engine.world_size

    def bucket(
        self, flat: Tensor, parameters: Sequence[Tensor] = (), spans: tuple[Span, ...] = (), *, index: int = 0
    ) -> Bucket:
        """A bucket of the group."""
        return self.engine.rounds.bucket(flat, parameters, spans, step=self.step, index=index, group=self.group)

    def tell(
        self, hook: Hook, device: torch.device, *, topic: str = "average", counted: bool = False
    ) -> HookError | None:
        """Run an exchange of words, which no observer sees; return what went wrong in it.

        Args:
            hook: whose ``reduce`` it is; its bucket is one zero.
            device: where the bucket lies.
            topic: tells apart what differs from round to round.
            counted: whether its figures count for the step before.
        """
        word = self.bucket(torch.zeros(1, device=device))
        return self._run(hook, [word], topic=topic, counted=counted, observed=False)

    def begin(self) -> None:
        """What hooks remember from now on counts if ``end`` says so."""
        self.engine.state.begin()

    def reduce(self, rounds: Iterable[Round]) -> HookError | None:
        """Run rounds, each asked for when the one before it went well; return what went wrong.

        A round is a hook, its buckets, and a flag or ``None``: one element, summed over the group in the confirming
        round. The figures count for the step before.
        """
        forgets = self.engine.state.is_empty()
        for hook, buckets, flag in rounds:
            reduced: list[Bucket] = []
            failure = self._run(hook, _noted(buckets, reduced), flag=flag)
            if failure is not None:
                return failure
            self._finite = self._finite and (forgets or all(bool(bucket.finite) for bucket in reduced))
        return None

    def end(self, failure: BaseException | None, elsewhere: Elsewhere | None = None) -> BaseException | None:
        """Keep what the hooks remember, if nothing went wrong and all that was reduced is finite.

        Args:
            failure: what went wrong here, if anything.
            elsewhere: as for ``Engine.end``.

        Returns:
            What went wrong, here or there.
        """
        engine, finite = self.engine, self._finite
        if elsewhere is not None:
            told, everywhere = elsewhere(failure, finite)
            finite = bool(everywhere)
            if failure is None and told:
                failure = engine.fail(told)
        if failure is None:
            engine.state.commit(finite)
        else:
            engine.state.rollback()
        return failure

    def extend(self, names: Iterable[str]) -> None:
        """Have state for more parameters."""
        self.engine.state.extend(names)

    def _run(
        self,
        hook: Hook,
        buckets: Iterable[Bucket],
        *,
        topic: str = "average",
        flag: Tensor | None = None,
        counted: bool = True,
        observed: bool = True,
    ) -> HookError | None:
        engine, rounds = self.engine, self.engine.rounds
        figures = rounds.run(
            Confined(hook, self.group),
            buckets,
            topic,
            self.group,
            step=engine.step,
            wire=engine.wire,
            watch=not engine.state.is_empty(),
            flag=flag,
            observed=observed,
        )
        if counted:
            engine.stats.add(figures)
            engine.stats.last.add(figures)
        return rounds.failure


def _noted(buckets: Iterable[Bucket], into: list[Bucket]) -> Iterable[Bucket]:
    for bucket in buckets:
        into.append(bucket)
        yield bucket
