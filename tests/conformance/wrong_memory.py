"""Hooks that remember what they should not, or where nobody finds it. The text is a plugin's; see zoo.py."""

import attrs
import torch

from commhub import AllReduce


@attrs.define(slots=False)
class Leaks:
    seen: list = attrs.field(init=False, factory=list)

    def reduce(self, bucket):
        self.seen.append(bucket.flat.clone())
        bucket.flat.copy_((yield AllReduce(bucket.flat)))


@attrs.define(slots=False)
class ByBucketIndex:
    """Adds a hundredth of the last result of the bucket with this number."""

    last: dict = attrs.field(init=False, factory=dict)

    def reduce(self, bucket):
        mean = (yield AllReduce(bucket.flat)).clone()
        before = self.last.get(bucket.index)
        bucket.flat.copy_(mean if before is None or before.shape != mean.shape else mean + 1e-2 * before)
        if mean.isfinite().all():
            self.last[bucket.index] = mean


@attrs.define(slots=False)
class OutsideState:
    """Remembers by name, but where no checkpoint finds it."""

    last: dict = attrs.field(init=False, factory=dict)

    def reduce(self, bucket):
        mean = (yield AllReduce(bucket.flat)).clone()
        bucket.flat.copy_(mean)
        for name, own, view in zip(
            bucket.names, mean.split([g.numel() for g in bucket.gradients]), bucket.segments, strict=True
        ):
            if name in self.last and own.isfinite().all():
                view.add_(self.last[name], alpha=1e-3)
            if own.isfinite().all():
                self.last[name] = own.clone()


class Feeding:
    """Sends what rounding to a coarse grid leaves, and keeps the rest."""

    def prepare(self, setup):
        self.state = setup.state
        for name, shape, dtype in zip(setup.names, setup.shapes, setup.dtypes, strict=True):
            self.state.local(name)["residual"] = torch.zeros(shape, dtype=torch.promote_types(dtype, torch.float32))

    def scale(self, bucket):
        return bucket.loss_scale

    def coarse(self, x):
        if x.is_complex():
            return x.clone()
        step = x.abs().max() / 8
        return torch.where(step > 0, (x / step).round() * step, x)

    def reduce(self, bucket):
        own = []
        for i, segment in enumerate(bucket.segments):
            if not segment.numel():
                own.append((segment, segment))
                continue
            table = self.state.local(bucket.names[i])
            kept = table["residual"].reshape(-1).to(segment.dtype)
            whole = segment / self.scale(bucket) + (kept if bucket.used[i] else 0)
            rough = self.coarse(whole)
            own.append((whole, rough))
            segment.copy_(rough * self.scale(bucket))
        mean = yield AllReduce(bucket.flat)
        bucket.flat.copy_(mean)
        for i, (whole, rough) in enumerate(own):
            table = self.state.local(bucket.names[i])
            if bucket.used[i] and whole.numel():
                self.keep(bucket, i, table, whole, rough)

    def keep(self, bucket, i, table, whole, rough):
        if bool(bucket.finite):
            table["residual"] = (whole - rough).view(table["residual"].shape).to(table["residual"].dtype)


@attrs.define(slots=False)
class FeedsBack(Feeding):
    pass


@attrs.define(slots=False)
class StoresAnInf(Feeding):
    def keep(self, bucket, i, table, whole, rough):
        table["residual"].copy_((whole - rough).view(table["residual"].shape))


@attrs.define(slots=False)
class ResidualOfTheAverage(Feeding):
    """What PyTorch's hooks keep: local minus averaged."""

    def keep(self, bucket, i, table, whole, rough):
        if bool(bucket.finite):
            mean = bucket.segments[i] / self.scale(bucket)
            table["residual"] = (whole - mean).view(table["residual"].shape).to(table["residual"].dtype)


@attrs.define(slots=False)
class LosesHalf(Feeding):
    def keep(self, bucket, i, table, whole, rough):
        if bool(bucket.finite):
            half = (whole - rough) / 2
            table["residual"] = half.view(table["residual"].shape).to(table["residual"].dtype)


@attrs.define(slots=False)
class ScaledResiduals(Feeding):
    """Keeps residuals multiplied by the loss scale of their step."""

    def scale(self, bucket):
        return 1.0


@attrs.define(slots=False)
class LeavesResidualsBehind(Feeding):
    """Keeps residuals on the parameters too, and takes up those that it finds there."""

    def prepare(self, setup):
        Feeding.prepare(self, setup)
        for name, parameter in zip(setup.names, setup.parameters, strict=False):  # a simulation has none
            if hasattr(parameter, "_residual"):
                self.state.local(name)["residual"].copy_(parameter._residual)

    def keep(self, bucket, i, table, whole, rough):
        Feeding.keep(self, bucket, i, table, whole, rough)
        bucket.parameters[i]._residual = table["residual"]


@attrs.define(slots=False)
class NormByBucket:
    """Keeps the last norm of each bucket, under the name of its first parameter."""

    def prepare(self, setup):
        self.state = setup.state

    def reduce(self, bucket):
        bucket.flat.copy_((yield AllReduce(bucket.flat)))
        self.state.shared(bucket.names[0])["norm"] = bucket.flat.norm()
