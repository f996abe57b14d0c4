"""One factor a step, the other from the step before: half a power iteration, for half the bytes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from commhub import AllReduce

from ._iteration import orthonormal

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor

    from commhub import Bucket

    from ._iteration import Approximation, Iteration
    from ._random import Source


def alternate(
    bucket: Bucket, approximations: Iterable[Approximation], message: Tensor, source: Source, *, left: bool
) -> Iteration:
    """Approximate the ranks' mean matrices with one factor new and one stale, by one all-reduce.

    If ``left``:

    1. Q = orthogonalize(Q), of the step before
    2. P = M Q, averaged; this rank's own P Q^T is what it contributed
    3. the result is P Q^T with the averaged P

    Otherwise with P and Q exchanged, and M transposed. Taken in turns these are the halves of one power iteration
    (ACP-SGD: Zhang et al. 2023, Evaluation and Optimization of Gradient Compression for Distributed Deep Learning,
    arXiv 2306.08881).

    Args:
        bucket: whose matrices they are, for ``finite`` and ``step``.
        approximations: each with the stale factor for ``start``; rows that are zero look into a new direction.
        message: 1-D: every ``p``, or else every ``q``, and anything that travels with them.
        source: of the directions that zero and collinear vectors are turned to.
        left: whether P is sent.

    Returns:
        The approximations, the averaged factor in them; it is not a number where the message was not finite.
    """
    taken = []
    for one in approximations:
        stale = orthonormal(one.start, one.matrices, "q" if left else "p", bucket.step, source)
        if left:
            one.hold_right(stale)
            one.send_left(stale, one.take_addends())
        else:
            one.send_right(stale, one.take_addends())
        taken.append(one)
    message.copy_((yield AllReduce(message)))
    spoil = torch.where(bucket.finite, 1.0, torch.nan)
    for one in taken:
        one.receive(spoil, left=left)
    return taken
