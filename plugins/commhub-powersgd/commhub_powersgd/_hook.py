"""PowerSGD (Vogels, Karimireddy, Jaggi 2019, arXiv 1905.13727): low-rank gradients by one power iteration a step."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, Self

import attrs
import torch
from torch import Tensor

from commhub import AllReduce, Bucket, Exchange, Setup
from commhub.toolkit import ErrorFeedback, PerBucket, Rules

from ._alternation import alternate
from ._bits import compare_bits
from ._bookkeeping import Tally
from ._compiled import Compiled, compiled_passes
from ._factors import Addends
from ._iteration import Approximation, power_iteration
from ._layout import Matrix, as_matrix
from ._limits import RANK, RATE, Limit, check_rule
from ._plan import Batch, Plan, Seat, lay_out
from ._random import Source

if TYPE_CHECKING:
    from collections.abc import MutableMapping, Sequence


@attrs.define(eq=False, kw_only=True, slots=False)
class PowerSGD:
    """Average gradient matrices as products of two thin factors, two messages per bucket.

    For each parameter, seen as a matrix M of n x m, with P of n x r and Q of m x r:

    1. add what former steps left unsent: M = gradient + residual
    2. P = M Q, averaged over the ranks, together with everything that is not compressed
    3. P = orthogonalize(P)
    4. Q = M^T P, averaged over the ranks
    5. keep what this rank's own P Q^T left unsent: residual = M - P Q^T
    6. the result is P Q^T with the averaged Q, which also starts the next step

    These are algorithms 1 and 2 of the paper. Steps 2 and 4 are linear in M, so that averaging factors averages
    matrices, and the result is the best rank-r approximation of the mean if gradients change slowly.

    Args:
        rank: r, at least 1. A matrix with fewer rows or columns is sent at their number.
        start_step: this many steps are averaged plainly and exactly first.
        min_compression_rate: a matrix is compressed if (n + m) r times this is below n m.
        error_feedback: keep residuals. Without them small gradients are lost for good.
        warm_start: start from the last step's Q. Otherwise from a random one in each step.
        num_power_iterations: each further one repeats steps 2 to 4 from an orthonormal Q, for two more messages.
        alternating: send P and Q in turns, one a step, with the other one from the step before (``alternate``):
            half the bytes in one message.
        seed: of the random starts.
        batch_same_shapes: work on matrices of one shape together; none means where it is faster: everywhere.
        stats_frequency: after so many steps each, rank 0 logs the compression so far.
        rules: by glob on parameter names, ``"dense"`` for what is averaged uncompressed, or a dict with another
            ``rank`` or ``min_compression_rate``. The longest pattern that matches a name decides.

    Raises:
        ValueError: if an option, or a setting in a rule, is out of range; if ``alternating`` is to go with several
            power iterations or without a warm start.
        HookOptionError: if a rule is malformed.
    """

    rank: int = attrs.field(default=1, validator=RANK)
    start_step: int = attrs.field(default=1000, validator=Limit(0))
    min_compression_rate: float = attrs.field(default=2.0, validator=RATE)
    error_feedback: bool = True
    warm_start: bool = True
    num_power_iterations: int = attrs.field(default=1, validator=Limit(1))
    alternating: bool = False
    seed: int = 0
    batch_same_shapes: bool | None = None
    stats_frequency: int = attrs.field(default=10_000, validator=Limit(1))
    rules: dict[str, object] = attrs.field(default={}, validator=attrs.validators.instance_of(dict))
    _rules: Rules = attrs.field(init=False, repr=False)
    _matrices: dict[str, Matrix] = attrs.field(init=False, factory=dict, repr=False)
    _plans: PerBucket[Plan] = attrs.field(init=False, repr=False, default=None)  # set, like the next two, by prepare
    _feedback: ErrorFeedback | None = attrs.field(init=False, default=None, repr=False)
    _source: Source = attrs.field(init=False, repr=False, default=None)
    _shared: dict[str, MutableMapping[str, Tensor]] = attrs.field(init=False, repr=False, factory=dict)
    _compiled: Compiled | None = attrs.field(init=False, default=None, repr=False)
    _tally: Tally = attrs.field(init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        if self.alternating and self.num_power_iterations > 1:
            raise ValueError(
                f"alternating and num_power_iterations={self.num_power_iterations} exclude each other: each step makes "
                "half an iteration. Give one of them."
            )
        if self.alternating and not self.warm_start:
            raise ValueError("alternating needs warm_start: one factor is the last step's. Leave warm_start on.")
        defaults = {"rank": self.rank, "min_compression_rate": self.min_compression_rate}
        self._tally = Tally("powersgd", self.stats_frequency)
        self._rules = Rules(self.rules, defaults, check_rule)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """The same options; what belongs to a registration stays behind."""
        return attrs.evolve(self, rules=copy.deepcopy(self.rules, memo))

    def prepare(self, setup: Setup) -> None:
        """Choose what is compressed; allocate residuals, and the same random Q on every rank."""
        settings = self._rules.settings(setup.names)
        self._source = Source(self.seed, setup.device)
        self._matrices, self._shared, self._plans = {}, {}, PerBucket(self._lay_out)
        setup.at_end(self._plans.made.clear)  # plans hold views of DDP's buckets
        for name, shape, strides, dtype in zip(setup.names, setup.shapes, setup.strides, setup.dtypes, strict=True):
            chosen: Any = settings[name]
            matrix = None if chosen is None else as_matrix(name, shape, strides, dtype, **chosen)
            if matrix is None:
                continue
            self._matrices[name] = matrix
            if self.warm_start:
                self._shared[name] = entries = setup.state.shared(name)
                wide = torch.promote_types(dtype, torch.float32)
                entries["q"] = self._source.factor(matrix, wide).T
                if self.alternating:
                    left = torch.zeros(matrix.rank, matrix.rows, dtype=wide, device=setup.device)
                    entries["p"] = left.T
        dtypes = dict(zip(setup.names, setup.dtypes, strict=True))
        compare_bits(
            setup,
            "powersgd",
            (
                (m.rows, m.cols, m.rank, torch.promote_types(dtypes[m.name], torch.float32))
                for m in self._matrices.values()
            ),
        )
        if setup.device.type == "cpu":
            self._compiled = compiled_passes(sum(matrix.rows * matrix.cols for matrix in self._matrices.values()))
        if self.error_feedback:
            self._feedback = ErrorFeedback(setup, self._matrices)
        if setup.rank == 0:
            setup.after_step(self._tally.log)

    def reduce(self, bucket: Bucket) -> Exchange:
        """Two all-reduces: of every P with what is not compressed, then of every Q. One where there is no P.

        Each further power iteration takes two more, of every P and of every Q. An alternation takes one in all.
        """
        plan = self._plans[bucket] if bucket.step >= self.start_step else None
        if plan is None or not plan.batches:
            bucket.flat.copy_((yield AllReduce(bucket.flat)))
            if plan is not None:
                self._tally.count(bucket.flat.numel(), bucket.flat.numel())
            return

        left = (bucket.step - self.start_step) % 2 == 0  # in an alternation P is sent, then Q, and so on
        in_first = left or not self.alternating
        message = plan.first if in_first else plan.second
        seat = plan.seat(bucket.flat)
        seat.pack_dense(left=in_first)
        given = (self._begin(bucket, seat, batch, left) for batch in reversed(plan.batches))
        if self.alternating:
            found = yield from alternate(bucket, given, message, self._source, left=left)
        else:
            found = yield from power_iteration(
                bucket,
                given,
                plan.first,
                plan.second,
                self._source,
                iterations=self.num_power_iterations,
                look=not self.error_feedback and not self.warm_start,
            )
        seat.unpack_dense(left=in_first)
        for batch, one in zip(reversed(plan.batches), found, strict=True):
            self._end(bucket, batch, one, left)
        sent = message.numel() if self.alternating else plan.sent(self.num_power_iterations)
        self._tally.count(bucket.flat.numel(), sent)

    def _begin(self, bucket: Bucket, seat: Seat, batch: Batch, left: bool) -> Approximation:
        """M = gradient + residual."""
        one = seat.approximation(batch, self._start(batch, bucket.step, "p" if self.alternating and not left else "q"))
        if self._feedback is not None:
            one.addends = Addends([self._feedback.waiting(bucket, i) for i in batch.places], bucket.loss_scale)
        return one

    def _end(self, bucket: Bucket, batch: Batch, one: Approximation, left: bool) -> None:
        """Keep what this rank's own contribution left unsent; leave the result in the bucket."""
        for part in one.parts():
            self._settle(bucket, batch.places[part], one, part)
        if one.m.dtype != bucket.flat.dtype:
            batch.inside(bucket.flat).copy_(one.m)
        if self.warm_start:
            key = "p" if self.alternating and left else "q"
            factors = one.next_stale(left=left) if self.alternating else one.next_start()
            for matrix, factor in zip(batch.matrices, factors, strict=True):
                self._shared[matrix.name][key] = factor.T

    def _settle(self, bucket: Bucket, places: Sequence[int], one: Approximation, part: slice) -> None:
        feedback = self._feedback
        residual = feedback.writable(bucket, places[0]) if feedback is not None and len(places) == 1 else None
        if feedback is not None and residual is not None:
            if one.exchange(part.start, residual):
                feedback.wrote(bucket, places[0])
            return
        if feedback is not None:
            one.subtract_own(part)
            for i, error in zip(places, one.m[part], strict=True):
                feedback.keep(bucket, i, error.view(-1))
        one.store_result(part)

    def compression_stats(self) -> tuple[float, int, int]:
        """Elements before over elements after compression, and both, over all compressed steps of this process."""
        return self._tally.figures()

    def _lay_out(self, bucket: Bucket) -> Plan:
        batched = self.batch_same_shapes is not False
        return lay_out(bucket, self._matrices, batched=batched, alternating=self.alternating, compiled=self._compiled)

    def _start(self, batch: Batch, step: int, key: str) -> Tensor:
        if self.warm_start:
            factors = [self._shared[matrix.name][key].T for matrix in batch.matrices]
        else:
            factors = [self._source.factor(matrix, batch.q.dtype, step) for matrix in batch.matrices]
        return factors[0].unsqueeze(0) if len(factors) == 1 else torch.stack(factors)
