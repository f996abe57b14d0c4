"""Momentum correction: what is accumulated and sent are velocities, not gradients (arXiv 1712.01887, section 3.1)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Iterable

    from commhub import Bucket, Setup


class Velocities:
    """Velocity u and accumulated velocity v of each parameter, local to the rank, in float32 or wider.

    They are assigned to the state, not written in place, so that a step which is not finite or which a loss scaler
    skips leaves both as they were. Those of a parameter that this rank did not use wait.

    Args:
        setup: what ``prepare`` got; the state is ``"velocity"``, and ``"accumulated"`` of what is compressed.
        compressed: names of the parameters of which a part is sent.
        momentum: m.
    """

    def __init__(self, setup: Setup, compressed: Iterable[str], momentum: float) -> None:
        self._state, self._momentum = setup.state, momentum
        partly = set(compressed)
        for name, shape, stride, dtype in zip(setup.names, setup.shapes, setup.strides, setup.dtypes, strict=True):
            for key in ("velocity", "accumulated") if name in partly else ("velocity",):
                wide = torch.promote_types(dtype, torch.float32)
                zeros = torch.empty_strided(shape, stride, dtype=wide, device=setup.device).zero_()
                setup.state.local(name)[key] = zeros

    def advance(self, bucket: Bucket, i: int) -> Tensor:
        """Velocity, u = m u + gradient, of the bucket's i-th parameter: 1-D, memory order, times the loss scale."""
        gradient = bucket.segments[i]
        wide = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
        if not bucket.used[i]:
            return wide
        velocity = self._flat(bucket, i, "velocity") * self._momentum
        velocity.add_(wide, alpha=1 / bucket.loss_scale)
        self._assign(bucket, i, "velocity", velocity)
        return velocity * bucket.loss_scale

    def compensated(self, bucket: Bucket, i: int) -> Tensor:
        """Accumulated velocity v + u, with u advanced: 1-D, memory order, times the loss scale, in its own memory."""
        velocity = self.advance(bucket, i)
        if not bucket.used[i]:
            return velocity.clone()
        return velocity.add_(self._flat(bucket, i, "accumulated"), alpha=bucket.loss_scale)

    def keep(self, bucket: Bucket, i: int, unsent: Tensor, places: Tensor) -> None:
        """Remember v = ``unsent`` (consumed), and mask u where v was sent: stale momentum stops there (section 3.2)."""
        if bucket.used[i]:
            self._assign(bucket, i, "accumulated", unsent.div_(bucket.loss_scale))
            self._flat(bucket, i, "velocity").index_fill_(0, places, 0)

    def _flat(self, bucket: Bucket, i: int, key: str) -> Tensor:
        kept = self._state.local(bucket.names[i])[key]
        return kept.as_strided((kept.numel(),), (1,))

    def _assign(self, bucket: Bucket, i: int, key: str, flat: Tensor) -> None:
        entries = self._state.local(bucket.names[i])
        entries[key] = flat.as_strided(entries[key].shape, entries[key].stride())
