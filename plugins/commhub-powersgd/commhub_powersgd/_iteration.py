"""From matrices to two thin factors each: power iteration across ranks, of which only factors travel."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs
import torch
from torch import Tensor

from commhub import AllReduce

from ._orthogonal import orthogonalize, renew
from ._products import products

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable, Sequence

    from commhub import Bucket, Collective

    from ._compiled import Compiled
    from ._factors import Addends, Factor, Products
    from ._layout import Matrix
    from ._random import Source

    Iteration = Generator[Collective, Any, list["Approximation"]]

_EVERY = slice(None)


@attrs.define(eq=False, kw_only=True)
class Approximation:
    """Matrices of one shape on the way to P Q^T, their mean over the ranks at a low rank.

    Factors are kept transposed, one vector per row. All tensors are of one dtype, float32 or float64. One object may
    serve in every step in which ``m``, ``p`` and ``q`` are the same memory: it is faster then, for it keeps room for
    factors, and views.

    Attributes:
        matrices: what they are; their names and shapes are the same on every rank.
        m: this rank's, (batch, rows, cols); the result is left here.
        start: the factor to begin with, the same on every rank: the right one, (batch, rank, cols), where two are sent.
        p, q: where the factors lie in the messages, (batch, rank, rows) and (batch, rank, cols).
        addends: what to add to ``m`` when it is first multiplied.
        compiled: the passes over ``m`` from ``compiled_passes``, if there are any.
    """

    matrices: tuple[Matrix, ...]
    m: Tensor
    start: Tensor
    p: Tensor
    q: Tensor
    addends: Addends | None = None
    compiled: Compiled | None = None
    _products: Products = attrs.field(init=False, repr=False)
    _averaged: dict[bool, Factor] = attrs.field(init=False, factory=dict, repr=False)
    _is_left: bool = attrs.field(init=False, default=False, repr=False)

    def __attrs_post_init__(self) -> None:
        self._products = products(self.m, self.p.shape[1], self.compiled)

    def send_left(self, q: Tensor, addends: Addends | None = None) -> None:
        """P = M Q, this rank's, and a copy in the message; from there on that is the driver's."""
        self._products.multiply_right(q, addends)
        self.p.copy_(self._products.left.values)

    def send_right(self, p: Tensor, addends: Addends | None = None) -> None:
        """Q = M^T P, this rank's, and a copy in the message; P is this rank's too."""
        self._products.multiply_left(p, addends)
        self.q.copy_(self._products.right.values)

    def take_addends(self) -> Addends | None:
        """What to add to ``m``, once. Their memory is not held on: a step may put others in their place."""
        taken, self.addends = self.addends, None
        return taken

    def hold_right(self, q: Tensor) -> None:
        """Q is this rank's, and no other is sent."""
        self._products.right.values.copy_(q)

    def receive(self, spoil: Tensor, *, left: bool = False) -> None:
        """Take the averaged factor from the message, Q or if ``left`` P, multiplied by ``spoil``."""
        if left not in self._averaged:
            self._averaged[left] = self._products.averaged(left=left)
        self._is_left = left
        torch.mul(self.p if left else self.q, spoil, out=self._averaged[left].values)

    def parts(self) -> Sequence[slice]:
        """Which matrices to go on with together: all of them, or on the host one by one, what was seen last first."""
        return self._products.parts()

    def subtract_own(self, part: slice = _EVERY) -> None:
        """M = M - P Q^T, with this rank's own contribution: what it left unsent."""
        self._products.subtract(part)

    def store_result(self, part: slice = _EVERY) -> None:
        """M = P Q^T, the mean."""
        self._products.store(part, *self._mean())

    def exchange(self, i: int, error: Tensor) -> bool:
        """Both at once for the i-th matrix: ``error`` (n m elements) is what this rank left unsent.

        Returns whether that is known to be finite.
        """
        return self._products.exchange(i, *self._mean(), error)

    def next_start(self) -> Tensor:
        """The right factor to begin the next step with; see ``renew``."""
        return renew(self._mean()[1].values, self.start)

    def next_stale(self, *, left: bool) -> Tensor:
        """The factor just sent, for the next step to use; zero where it has no direction, to look elsewhere then."""
        factor = self._mean()[0 if left else 1].values
        return renew(factor, torch.zeros_like(factor))

    def _mean(self) -> tuple[Factor, Factor]:
        averaged = self._averaged[self._is_left]
        return (averaged, self._products.right) if self._is_left else (self._products.left, averaged)


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
        The approximations, the averaged factors in them; these are not a number where a message was not finite.
    """
    taken = []
    for one in approximations:
        one.send_left(one.start, one.take_addends())
        taken.append(one)
    factors = first[: sum(one.p.numel() for one in taken)]
    for iteration in range(iterations):
        if iteration:
            for one in taken:
                one.send_left(_finite_orthonormal(one, "q", bucket, source))
        sent = factors if iteration else first
        _note(sent.copy_((yield AllReduce(sent))), bucket, look)  # no copy where it is the very tensor
        for one in taken:
            one.send_right(_finite_orthonormal(one, "p", bucket, source))
        _note(second.copy_((yield AllReduce(second))), bucket, look)
    spoil = torch.where(bucket.finite, 1.0, torch.nan)
    for one in taken:
        one.receive(spoil)
    return taken


def orthonormal(factor: Tensor, matrices: Sequence[Matrix], side: str, step: int, source: Source) -> Tensor:
    """The factor ``side`` of some matrices, (batch, rank, n) and finite, with orthonormal rows."""
    return orthogonalize(factor, source.directions(matrices, side, factor, step))


def _finite_orthonormal(one: Approximation, side: str, bucket: Bucket, source: Source) -> Tensor:
    """The averaged factor, orthonormal; zero before that if it is not finite, for a QR may turn NaN into numbers."""
    factor = one.p if side == "p" else one.q
    if factor.device.type != "cpu" or not bucket.finite:
        factor = torch.where(bucket.finite, factor, 0.0)
    return orthonormal(factor, one.matrices, side, bucket.step, source)


def _note(result: Tensor, bucket: Bucket, look: bool) -> None:
    if look:
        bucket.finite = bucket.finite & torch.isfinite(result.sum())
