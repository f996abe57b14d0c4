"""Error feedback, once for every hook that sends less than it was given.

What a step leaves unsent is kept on this rank and added to the next gradient (Seide et al. 2014; Karimireddy et al.
2019, arXiv 1901.09847). It is local: this rank's own contribution is what was sent, never the average.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from commhub.protocol._finite import all_finite

if TYPE_CHECKING:
    from collections.abc import Iterable

    from commhub.protocol._bucket import Bucket
    from commhub.protocol._setup import Setup


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
        """Add the residual of the bucket's i-th parameter to ``values`` (1-D, memory order), in place.

        For ``reduce_scatter`` they are (p, elements), a piece for each rank.
        """
        residual = self.waiting(bucket, i)
        return values if residual is None else values.add_(residual.view(values.shape), alpha=bucket.loss_scale)

    def waiting(self, bucket: Bucket, i: int) -> Tensor | None:
        """The residual itself (1-D, memory order), for a hook that adds it as it goes instead of calling ``add``.

        It is to be multiplied by ``bucket.loss_scale``. ``None`` where there is nothing to add: the residual of a
        parameter that this rank did not use waits.
        """
        return self._residual(bucket, i) if bucket.used[i] else None

    def keep(self, bucket: Bucket, i: int, error: Tensor, *, finite: bool = False) -> None:
        """Remember ``error`` (1-D, memory order: compensated minus own contribution) if the step is finite.

        For ``reduce_scatter`` it is (p, elements), a piece for each rank.

        Branch-free: a non-finite bucket, or error, leaves the residual as it was. What the bucket comes to is waited
        for where that is not known yet (see ``Bucket.finite``): then, and with a loss scale, what was kept counts from
        the end of the step on. ``error`` is consumed.

        Args:
            bucket, i: which parameter.
            error: what was not sent.
            finite: says that ``error`` cannot but be finite where ``bucket.finite`` is; that spares a look at it.
        """
        if not bucket.used[i]:
            return
        if bucket.loss_scale != 1.0:
            error.div_(bucket.loss_scale)
        self._put(bucket, i, 0, error.reshape(-1), finite=finite)

    def deposit(self, bucket: Bucket, i: int, start: int, missed: Tensor) -> None:
        """Add ``missed`` (1-D, consumed) to a residual's elements from ``start`` on, as ``keep`` would replace them.

        For a rank that owes more than its own gradient, and may not have used the parameter in this step.
        """
        some = self._residual(bucket, i).narrow(0, start, missed.numel())
        if bucket.loss_scale != 1.0:
            missed.div_(bucket.loss_scale)
        self._put(bucket, i, start, missed.add_(some))

    def _put(self, bucket: Bucket, i: int, start: int, new: Tensor, *, finite: bool = False) -> None:
        """Write a part of a residual, or all of it; in place where nothing can come that would undo it."""
        entries = self._entries[bucket.names[i]]
        kept = entries["residual"]
        on_host = kept.device.type == "cpu"
        if on_host and not bucket.finite:  # the answer is there already, and a copy is four times as fast
            return
        if not finite:
            new = new.to(kept.dtype)  # a narrow one may overflow
            ok = all_finite(new)
            if on_host and not ok:
                return
        old = _flat(kept).narrow(0, start, new.numel())
        # A loss scaler skips the step if any bucket is not finite, so the end of the step decides, not this bucket.
        if bucket.loss_scale != 1.0 or not bucket.judged:
            whole = new.numel() == kept.numel()
            entries["residual"] = kept = torch.empty_like(kept) if whole else kept.clone()
        place = _flat(kept).narrow(0, start, new.numel())
        if on_host:
            place.copy_(new)
        else:
            torch.where(bucket.finite if finite else bucket.finite & ok, new.to(kept.dtype), old, out=place)

    def writable(self, bucket: Bucket, i: int) -> Tensor | None:
        """The residual itself (1-D, memory order), to write the error into instead of calling ``keep``, where safe.

        It is where ``keep`` would do nothing but look and copy: the bucket is finite, which is known on the host, the
        parameter was used, and no loss scaler decides later. Else ``None``, and ``keep`` is to be called.

        When the exchange has ended, the core looks at what was written, and puts zeros for what is not finite. A hook
        that has seen to that itself spares it the look by ``wrote``.
        """
        on_host = bucket.flat.device.type == "cpu"
        if on_host and bucket.used[i] and bucket.loss_scale == 1.0 and bucket.judged and bool(bucket.finite):
            residual = self._residual(bucket, i)
            bucket.written[residual.data_ptr()] = residual
            return residual
        return None

    def wrote(self, bucket: Bucket, i: int) -> None:
        """Say that what was written into a ``writable`` residual is finite, each element of it."""
        bucket.written.pop(self._residual(bucket, i).data_ptr(), None)

    def _residual(self, bucket: Bucket, i: int) -> Tensor:
        return _flat(self._entries[bucket.names[i]]["residual"])


def _flat(residual: Tensor) -> Tensor:
    """Its elements in memory order, 1-D."""
    return residual.as_strided((residual.numel(),), (1,))
