"""From matrices to two thin factors each: power iteration across ranks, of which only factors travel."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs
import torch
from torch import Tensor

from commhub import AllReduce

from ._orthogonal import orthogonalize, renew
from ._products import Addends, exchange_product, left_factor, right_factor, store_product, subtract_product

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable, Sequence

    from commhub import Bucket, Collective

    from ._layout import Matrix
    from ._random import Source

    Iteration = Generator[Collective, Any, list["Approximation"]]

_EVERY = slice(None)


@attrs.define(eq=False, kw_only=True)
class Approximation:
    """Matrices of one shape on the way to P Q^T, their mean over the ranks at a low rank.

    Factors are kept transposed, one vector per row. All tensors are of one dtype, float32 or float64.

    Attributes:
        matrices: what they are; their names and shapes are the same on every rank.
        m: this rank's, (batch, rows, cols); the result is left here.
        start: the factor to begin with, the same on every rank: the right one, (batch, rank, cols), where two are sent.
        p, q: where the factors lie in the messages, (batch, rank, rows) and (batch, rank, cols).
        addends: what to add to ``m`` when it is first multiplied.
        own: the factors of what this rank contributed to the result.
        mean: the factors of the result.
    """

    matrices: tuple[Matrix, ...]
    m: Tensor
    start: Tensor
    p: Tensor
    q: Tensor
    addends: Addends | None = None
    own: tuple[Tensor, Tensor] = attrs.field(init=False)
    mean: tuple[Tensor, Tensor] = attrs.field(init=False)

    def parts(self) -> Sequence[slice]:
        """Which matrices to go on with together: all of them, or on the host one by one, what was seen last first."""
        count = len(self.m)
        return [slice(i, i + 1) for i in reversed(range(count))] if self.m.device.type == "cpu" else [slice(0, count)]

    def subtract_own(self, part: slice = _EVERY) -> None:
        """M = M - P Q^T, with this rank's own contribution: what it left unsent."""
        subtract_product(self.m[part], _part(self.own, part), self.m[part])

    def store_result(self, part: slice = _EVERY) -> None:
        """M = P Q^T, the mean."""
        store_product(_part(self.mean, part), self.m[part])

    def exchange(self, i: int, error: Tensor) -> None:
        """Both at once for the i-th matrix, on the host: ``error`` (n m elements) is what this rank left unsent."""
        m = self.m[i]
        own, mean = ((p[i], q[i]) for p, q in (self.own, self.mean))
        exchange_product(m, own, mean, error.view(m.shape))

    def next_start(self) -> Tensor:
        """The right factor to begin the next step with; see ``renew``."""
        return renew(self.mean[1], self.start)

    def next_stale(self, *, left: bool) -> Tensor:
        """The factor just sent, for the next step to use; zero where it has no direction, to look elsewhere then."""
        factor = self.mean[0 if left else 1]
        return renew(factor, torch.zeros_like(factor))


def power_iteration(
    bucket: Bucket,
    approximations: Iterable[Approximation],
    first: Tensor,
    second: Tensor,
    source: Source,
    *,
    iterations: int = 1,
    look: bool = False,
) -> Iteration:
    """Approximate the ranks' mean matrices by ``iterations`` steps of subspace iteration, two all-reduces each.

    1. P = M Q, averaged
    2. P = orthogonalize(P)
    3. Q = M^T P, averaged
    4. once more from 1, with Q = orthogonalize(Q); the last Q stays as it is, for P Q^T is the result

    Algorithm 1 of Vogels et al. 2019 is one iteration. Each further one brings the span of P closer to the dominant
    left singular vectors of the mean, by the square of the ratio of its singular values.

    Args:
        bucket: whose matrices they are, for ``finite`` and ``step``.
        approximations: may be made one by one, while this multiplies: a matrix just made is in the cache.
        first: the first message, 1-D: every ``p``, then anything else; that travels once.
        second: the second message, 1-D: every ``q``.
        source: of the directions that zero and collinear vectors are turned to.
        iterations: at least 1.
        look: whether to look for results that are not finite; the core does for hooks that hold state.

    Returns:
        The approximations with ``own`` and ``mean`` set; ``mean`` is not a number where a message was not finite.
    """
    taken = []
    for one in approximations:
        one.p.copy_(left_factor(one.m, one.start, one.addends))
        taken.append(one)
    factors = first[: sum(one.p.numel() for one in taken)]
    for iteration in range(iterations):
        if iteration:
            for one in taken:
                one.p.copy_(left_factor(one.m, _finite_orthonormal(one, "q", bucket, source)))
        _note((yield AllReduce(factors if iteration else first)), bucket, look)
        for one in taken:
            left = _finite_orthonormal(one, "p", bucket, source)
            right = right_factor(one.m, left)
            one.q.copy_(right)  # from here on the message is the driver's; this rank's own stays
            one.own = (left, right)
        _note((yield AllReduce(second)), bucket, look)
    spoil = torch.where(bucket.finite, 1.0, torch.nan)
    for one in taken:
        one.mean = (one.own[0], one.q * spoil)
    return taken


def orthonormal(factor: Tensor, matrices: Sequence[Matrix], side: str, step: int, source: Source) -> Tensor:
    """The factor ``side`` of some matrices, (batch, rank, n) and finite, with orthonormal rows."""
    directions = [source.directions(matrix, side, factor.dtype, step) for matrix in matrices]
    return orthogonalize(factor, torch.stack(directions))


def _part(factors: tuple[Tensor, Tensor], part: slice) -> tuple[Tensor, Tensor]:
    return factors[0][part], factors[1][part]


def _finite_orthonormal(one: Approximation, side: str, bucket: Bucket, source: Source) -> Tensor:
    """The averaged factor, orthonormal; zero before that if it is not finite, for a QR may turn NaN into numbers."""
    factor = torch.where(bucket.finite, one.p if side == "p" else one.q, 0.0)
    return orthonormal(factor, one.matrices, side, bucket.step, source)


def _note(result: Tensor, bucket: Bucket, look: bool) -> None:
    if look:
        bucket.finite = bucket.finite & torch.isfinite(result.sum())
