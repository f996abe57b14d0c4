"""Error feedback, once for every hook that sends less than it was given.

What a step leaves unsent is kept on this rank and added to the next gradient (Seide et al. 2014; Karimireddy et al.
2019, arXiv 1901.09847). It is local: this rank's own contribution is what was sent, never the average.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ._bucket import Bucket
    from ._protocols import Setup


class ErrorFeedback:
    """Residuals of some parameters, in the wider of float32 and the gradient's dtype.

    Args:
        setup: what ``prepare`` got; the residuals live in ``setup.state.local(name)["residual"]``.
        names: the parameters that are sent compressed. What is sent exactly has no residual.
        dtype: of the residuals, where that is not to be the wider of float32 and the gradient's.
    """

    def __init__(self, setup: Setup, names: Iterable[str], dtype: torch.dtype | None = None) -> None:
        described = dict(zip(setup.names, zip(setup.shapes, setup.strides, setup.dtypes, strict=True), strict=True))
        self._entries = {name: setup.state.local(name) for name in names}
        for name, entries in self._entries.items():
            shape, stride, own = described[name]
            kept = torch.promote_types(own, torch.float32) if dtype is None else dtype
            residual = torch.empty_strided(shape, stride, dtype=kept, device=setup.device).zero_()
            entries["residual"] = residual

    def compensated(self, bucket: Bucket, i: int) -> Tensor:
        """Gradient plus residual of the bucket's i-th parameter: 1-D, in memory order, in float32 or wider.

        For float32 and wider gradients this is the bucket's own memory, changed in place. The residual of a
        parameter that this rank did not use waits.
        """
        gradient = bucket.segments[i]
        return self.add(bucket, i, gradient.to(torch.promote_types(gradient.dtype, torch.float32)))

    def add(self, bucket: Bucket, i: int, values: Tensor) -> Tensor:
        """Add the residual of the bucket's i-th parameter to ``values`` (1-D, memory order), in place."""
        residual = self.waiting(bucket, i)
        return values if residual is None else values.add_(residual, alpha=bucket.loss_scale)

    def waiting(self, bucket: Bucket, i: int) -> Tensor | None:
        """The residual itself (1-D, memory order), for a hook that adds it as it goes instead of calling ``add``.

        It is to be multiplied by ``bucket.loss_scale``. ``None`` where there is nothing to add: the residual of a
        parameter that this rank did not use waits.
        """
        return self._residual(bucket, i) if bucket.used[i] else None

    def keep(self, bucket: Bucket, i: int, error: Tensor) -> None:
        """Remember ``error`` (1-D, memory order: compensated minus own contribution) if the bucket is finite so far.

        Branch-free: a non-finite bucket leaves the residual as it was. ``error`` is consumed.
        """
        if not bucket.used[i]:
            return
        residual = self._residual(bucket, i)
        if bucket.loss_scale == 1.0:
            if residual.device.type != "cpu":
                torch.where(bucket.finite, error.to(residual.dtype), residual, out=residual)
            elif bool(bucket.finite):  # on the host the answer is there already, and a copy is four times as fast
                residual.copy_(error)
            return
        # A loss scaler skips the step if any bucket is not finite, so the end of the step decides, not this bucket.
        entries = self._entries[bucket.names[i]]
        kept = entries["residual"]
        unscaled = torch.where(bucket.finite, error.div_(bucket.loss_scale).to(residual.dtype), residual)
        entries["residual"] = unscaled.as_strided(kept.shape, kept.stride())

    def deposit(self, bucket: Bucket, i: int, start: int, missed: Tensor) -> None:
        """Add ``missed`` (1-D, consumed) to a residual's elements from ``start`` on, if the bucket is finite so far.

        For a rank that owes more than its own gradient, and may not have used the parameter in this step.
        """
        entries = self._entries[bucket.names[i]]
        if bucket.loss_scale != 1.0:
            kept = entries["residual"]
            entries["residual"] = kept.clone(memory_format=torch.preserve_format)
            missed.div_(bucket.loss_scale)
        some = self._residual(bucket, i).narrow(0, start, missed.numel())
        some.add_(torch.where(bucket.finite, missed, 0.0))

    def writable(self, bucket: Bucket, i: int) -> Tensor | None:
        """The residual itself (1-D, memory order), to write the error into instead of calling ``keep``, where safe.

        It is where ``keep`` would do nothing but copy: the bucket is finite so far, which is known on the host, the
        parameter was used, and no loss scaler decides later. Else ``None``, and ``keep`` is to be called.
        """
        on_host = bucket.flat.device.type == "cpu"
        if on_host and bucket.used[i] and bucket.loss_scale == 1.0 and bool(bucket.finite):
            return self._residual(bucket, i)
        return None

    def _residual(self, bucket: Bucket, i: int) -> Tensor:
        residual = self._entries[bucket.names[i]]["residual"]
        return residual.as_strided((residual.numel(),), (1,))
