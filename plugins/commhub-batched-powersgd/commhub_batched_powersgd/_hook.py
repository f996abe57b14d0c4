"""Batched PowerSGD: PowerSGD (Vogels, Karimireddy, Jaggi 2019, arXiv 1905.13727) on whole buckets."""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING, Any, Self

import attrs
import torch
from commhub_powersgd import Compiled, Limit, Source, Tally, compare_bits, compiled_passes, power_iteration
from torch import Tensor

from commhub import AllReduce, Bucket, Exchange, Setup
from commhub.toolkit import ErrorFeedback, PerBucket, Rules

from ._square import Square, lay_out
from ._warm import WarmStart

if TYPE_CHECKING:
    from collections.abc import Iterator

_BUCKET = 25 << 18
"""Elements of float32 in a bucket of DDP's usual size: of which square the ranks compare the bits."""


@attrs.define(eq=False, kw_only=True, slots=False)
class BatchedPowerSGD:
    """Average each bucket of gradients as one square matrix of two thin factors.

    1. M = the bucket's gradients and residuals, zero-padded to a square of ceil(sqrt(n)) rows
    2. P = M Q, averaged over the ranks, together with which parameters are anything but zero, and with all that a
       rule leaves out of the square
    3. P = orthogonalize(P)
    4. Q = M^T P, averaged over the ranks
    5. keep what this rank's own P Q^T left unsent: residual = M - P Q^T
    6. the result is P Q^T with the averaged Q, which also starts the next step

    P Q^T mixes parameters. Where a parameter is zero on all ranks, gradient and residual, the result is set to
    zero, and so is each rank's contribution: residuals stay exact.

    Args:
        rank: r, at least 1.
        start_step: this many steps are averaged plainly and exactly first.
        min_compression_rate: a bucket is compressed if 2 r ceil(sqrt(n)) times this is below n, its elements without
            the dense ones. Otherwise it is sent as it is, with what waits for it.
        error_feedback: keep residuals. Without them small gradients are lost for good.
        warm_start: start from the last step's Q, where the bucket holds the same parameters as then.
        num_power_iterations: each further one repeats steps 2 to 4 from an orthonormal Q, for two more messages.
        seed: of the random starts.
        stats_frequency: after so many steps each, rank 0 logs the compression so far.
        rules: by glob on parameter names, ``"dense"`` for what is left out of the square and averaged exactly. The
            longest pattern that matches a name decides.

    Raises:
        ValueError: if an option is out of range.
        HookOptionError: if a rule is malformed.
    """

    rank: int = attrs.field(default=1, validator=Limit(1))
    start_step: int = attrs.field(default=1000, validator=Limit(0))
    min_compression_rate: float = attrs.field(default=2.0, validator=Limit(0, exclusive=True))
    error_feedback: bool = True
    warm_start: bool = True
    num_power_iterations: int = attrs.field(default=1, validator=Limit(1))
    seed: int = 0
    stats_frequency: int = attrs.field(default=10_000, validator=Limit(1))
    rules: dict[str, object] = attrs.field(default={}, validator=attrs.validators.instance_of(dict))
    _rules: Rules = attrs.field(init=False, repr=False)
    _tally: Tally = attrs.field(init=False, repr=False)
    _compressed: frozenset[str] = attrs.field(init=False, default=frozenset(), repr=False)
    _feedback: ErrorFeedback | None = attrs.field(init=False, default=None, repr=False)
    _compiled: Compiled | None = attrs.field(init=False, default=None, repr=False)
    _warm: WarmStart | None = attrs.field(init=False, default=None, repr=False)
    _source: Source = attrs.field(init=False, default=None, repr=False)  # set, like the next, by prepare
    _squares: PerBucket[Square | None] = attrs.field(init=False, default=None, repr=False)

    def __attrs_post_init__(self) -> None:
        self._tally = Tally("batched_powersgd", self.stats_frequency)
        self._rules = Rules(self.rules, {})  # the square has one rank, whoever is in it

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """The same options; what belongs to a registration stays behind."""
        return attrs.evolve(self, rules=copy.deepcopy(self.rules, memo))

    def prepare(self, setup: Setup) -> None:
        """Allocate residuals and factors for every parameter that may come to be compressed."""
        settings = self._rules.settings(setup.names)
        self._source = Source(self.seed, setup.device)
        self._squares = PerBucket(self._lay_out)
        dtypes = {
            name: torch.promote_types(dtype, torch.float32)
            for name, shape, dtype in zip(setup.names, setup.shapes, setup.dtypes, strict=True)
            if settings[name] is not None and dtype.is_floating_point and torch.Size(shape).numel()
        }
        self._compressed = frozenset(dtypes)
        sizes = dict(zip(setup.names, setup.shapes, strict=True))
        elements = sum(math.prod(sizes[name]) for name in dtypes)
        side = math.isqrt(max(min(elements, _BUCKET) - 1, 0)) + 1
        compare_bits(
            setup, "batched_powersgd", ((side, side, min(self.rank, side), dtype) for dtype in dtypes.values())
        )
        if setup.device.type == "cpu":
            self._compiled = compiled_passes(elements)
        self._feedback = ErrorFeedback(setup, dtypes) if self.error_feedback else None
        self._warm = WarmStart(setup, dtypes, self.rank) if self.warm_start else None
        if setup.rank == 0:
            setup.after_step(self._tally.log)

    def reduce(self, bucket: Bucket) -> Exchange:
        """Two all-reduces for each power iteration; one for a bucket that is not compressed."""
        if bucket.step < self.start_step:
            bucket.flat.copy_((yield AllReduce(bucket.flat)))
            return
        square = self._squares[bucket]
        if square is None:
            self._tally.count(bucket.flat.numel(), bucket.flat.numel())
            yield from self._exactly(bucket)
            return

        square.pack_dense(bucket)
        self._fill(bucket, square)
        one = square.one
        one.start = self._start(square, bucket.step)
        yield from power_iteration(
            bucket,
            [one],
            square.first,
            square.second,
            self._source,
            iterations=self.num_power_iterations,
            look=not self.error_feedback and not self.warm_start,
        )
        square.unpack_dense(bucket)
        if self._feedback is not None:
            one.subtract_own()
            self._keep(bucket, square, self._feedback)
        one.store_result()
        for i, result in _living(square):
            bucket.segments[i].copy_(result)
        if self._warm is not None:
            self._warm.store(square, one.next_start()[0])
        self._tally.count(bucket.flat.numel(), square.sent(self.num_power_iterations))

    def compression_stats(self) -> tuple[float, int, int]:
        """Elements before over elements after compression, and both, over all compressed steps of this process."""
        return self._tally.figures()

    def _lay_out(self, bucket: Bucket) -> Square | None:
        return lay_out(
            bucket,
            self._compressed,
            rank=self.rank,
            min_compression_rate=self.min_compression_rate,
            compiled=self._compiled,
        )

    def _fill(self, bucket: Bucket, square: Square) -> None:
        """M = gradient + residual, zero-padded; and whether there is anything of each parameter."""
        peaks = []
        for i, piece in zip(square.places, square.pieces, strict=True):
            piece.copy_(bucket.segments[i])
            if self._feedback is not None:
                self._feedback.add(bucket, i, piece)
            peaks.append(torch.linalg.vector_norm(piece, math.inf))  # not a number where there is none: not zero
        square.padding.zero_()
        square.alive.copy_(torch.stack(peaks) != 0)

    def _start(self, square: Square, step: int) -> Tensor:
        if self._warm is None:
            return self._source.factor(square.matrix, square.m.dtype, step)[None]
        fresh = self._source.factor(square.matrix, square.m.dtype)
        return self._warm.load(square, fresh)[None]

    def _keep(self, bucket: Bucket, square: Square, feedback: ErrorFeedback) -> None:
        """Remember what was not sent; of a parameter that this rank did not use, what it contributed all the same."""
        for i, error in _living(square):
            if bucket.used[i]:
                feedback.keep(bucket, i, error)
            else:
                feedback.deposit(bucket, i, 0, error)

    def _exactly(self, bucket: Bucket) -> Exchange:
        """Average a bucket as it is, with what waits for it from steps when it was part of a larger one."""
        unsent = []
        for i, name in enumerate(bucket.names):
            if self._feedback is not None and name in self._compressed:
                values = self._feedback.compensated(bucket, i)
                bucket.segments[i].copy_(values)
                unsent.append((i, values - bucket.segments[i]))  # in 16 bits there is rounding
        bucket.flat.copy_((yield AllReduce(bucket.flat)))
        for i, error in unsent:
            assert self._feedback is not None
            self._feedback.keep(bucket, i, error)


def _living(square: Square) -> Iterator[tuple[int, Tensor]]:
    """Each parameter's place in the bucket and its piece of the square; a piece that is zero on all ranks is zeroed.

    ``square.alive`` was averaged, and is the same everywhere.
    """
    on_host = square.alive.device.type == "cpu"
    for i, piece, alive in zip(square.places, square.pieces, square.alive, strict=True):
        if not on_host:
            piece.mul_(alive != 0)
        elif not alive:  # the answer is there already
            piece.zero_()
        yield i, piece
