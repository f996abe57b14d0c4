"""Hooks that are wrong on purpose, and the checks that each must fail: no others."""

SOURCE = """
import itertools
import random
import threading

import attrs
import torch
import torch.distributed as dist

import commhub
from commhub import AllGather, AllReduce, ErrorFeedback


@attrs.define
class Right:
    "The mean."

    def reduce(self, bucket):
        bucket.flat.copy_((yield AllReduce(bucket.flat)))


@attrs.define
class ForgetsToDivide:
    def reduce(self, bucket):
        bucket.flat.copy_((yield AllReduce(bucket.flat, op="sum")))


@attrs.define
class DiffersByRank:
    def reduce(self, bucket):
        mean = yield AllReduce(bucket.flat)
        bucket.flat.copy_(mean * (1 + 1e-7 * bucket.rank))


@attrs.define
class WrongDtype:
    def reduce(self, bucket):
        bucket.flat = (yield AllReduce(bucket.flat)).double()


@attrs.define
class WrongShape:
    def reduce(self, bucket):
        bucket.flat = (yield AllReduce(bucket.flat))[:-1]


@attrs.define(slots=False)
class Leaks:
    seen: list = attrs.field(init=False, factory=list)

    def reduce(self, bucket):
        self.seen.append(bucket.flat.clone())
        bucket.flat.copy_((yield AllReduce(bucket.flat)))


@attrs.define
class Blocks:
    def reduce(self, bucket):
        threading.Event().wait(1000)
        bucket.flat.copy_((yield AllReduce(bucket.flat)))


@attrs.define
class CommunicatesItself:
    def reduce(self, bucket):
        dist.all_reduce(bucket.flat)
        yield from ()


@attrs.define
class DiesInNativeCode:
    def reduce(self, bucket):
        import ctypes
        ctypes.string_at(0)
        yield from ()


@attrs.define(slots=False)
class ByBucketIndex:
    "Adds a hundredth of the last result of the bucket with this number."

    last: dict = attrs.field(init=False, factory=dict)

    def reduce(self, bucket):
        mean = (yield AllReduce(bucket.flat)).clone()
        before = self.last.get(bucket.index)
        bucket.flat.copy_(mean if before is None or before.shape != mean.shape else mean + 1e-2 * before)
        if mean.isfinite().all():
            self.last[bucket.index] = mean


@attrs.define(slots=False)
class OutsideState:
    "Remembers by name, but where no checkpoint finds it."

    last: dict = attrs.field(init=False, factory=dict)

    def reduce(self, bucket):
        mean = (yield AllReduce(bucket.flat)).clone()
        bucket.flat.copy_(mean)
        for name, own, view in zip(bucket.names, mean.split([g.numel() for g in bucket.gradients]), bucket.segments):
            if name in self.last and own.isfinite().all():
                view.add_(self.last[name], alpha=1e-3)
            if own.isfinite().all():
                self.last[name] = own.clone()


class Feeding:
    "Sends what rounding to a coarse grid leaves, and keeps the rest."

    def prepare(self, setup):
        self.state = setup.state
        for name, shape, dtype in zip(setup.names, setup.shapes, setup.dtypes):
            self.state.local(name)["residual"] = torch.zeros(shape, dtype=torch.promote_types(dtype, torch.float32))

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
            whole = segment / bucket.loss_scale + (kept if bucket.used[i] else 0)
            rough = self.coarse(whole)
            own.append((whole, rough))
            segment.copy_(rough * bucket.loss_scale)
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
    "What PyTorch's hooks keep: local minus averaged."

    def keep(self, bucket, i, table, whole, rough):
        if bool(bucket.finite):
            mean = bucket.segments[i] / bucket.loss_scale
            table["residual"] = (whole - mean).view(table["residual"].shape).to(table["residual"].dtype)


@attrs.define(slots=False)
class LosesHalf(Feeding):
    def keep(self, bucket, i, table, whole, rough):
        if bool(bucket.finite):
            half = (whole - rough) / 2
            table["residual"] = half.view(table["residual"].shape).to(table["residual"].dtype)


@attrs.define
class Gathers:
    "Every rank's gradient to every rank."

    def reduce(self, bucket):
        real = torch.view_as_real(bucket.flat).reshape(-1) if bucket.flat.is_complex() else bucket.flat
        every = (yield AllGather(real.contiguous())).view(bucket.world_size, -1)
        mean = every.to(torch.promote_types(every.dtype, torch.float32)).sum(0) / bucket.divisor
        real.copy_(mean)
        if bucket.flat.is_complex():
            bucket.flat.copy_(torch.view_as_complex(real.view(-1, 2)))


@attrs.define
class CastsBeforeDividing:
    def reduce(self, bucket):
        wide = bucket.flat.dtype in (torch.float32, torch.float64)
        if wide:
            half = yield AllReduce(bucket.flat.half(), op="sum")
            bucket.flat.copy_(half.to(bucket.flat.dtype) / bucket.divisor)
        else:
            bucket.flat.copy_((yield AllReduce(bucket.flat)))


@attrs.define
class DrawsFromTheGlobalGenerator:
    def reduce(self, bucket):
        torch.rand(1)
        bucket.flat.copy_((yield AllReduce(bucket.flat)))


@attrs.define
class AsksByValue:
    def reduce(self, bucket):
        count = int((bucket.flat != 0).sum())
        yield AllReduce(torch.zeros(1 + count))
        bucket.flat.copy_((yield AllReduce(bucket.flat)))


@attrs.define
class NanForZero:
    def reduce(self, bucket):
        for segment in bucket.segments:
            if segment.numel():
                size = segment.abs().max()
                segment.copy_(segment / size * size)
        bucket.flat.copy_((yield AllReduce(bucket.flat)))


@attrs.define
class ForgetsStrides:
    "Averages gradients as if they were contiguous."

    def reduce(self, bucket):
        logical = torch.cat([g.reshape(-1) for g in bucket.gradients])
        bucket.flat.copy_((yield AllReduce(logical)))


@attrs.define
class HidesAnInf:
    def reduce(self, bucket):
        bucket.flat.copy_((yield AllReduce(torch.nan_to_num(bucket.flat, 0.0, 0.0, 0.0))))


@attrs.define
class TakesMore:
    speed: int = 1

    def reduce(self, bucket):
        bucket.flat.copy_((yield AllReduce(bucket.flat)))


@attrs.define
class Grows:
    "A rank sends more, the more ranks there are."

    def reduce(self, bucket):
        yield AllReduce(torch.zeros(bucket.world_size * 2048))
        bucket.flat.copy_((yield AllReduce(bucket.flat)))


@attrs.define(slots=False)
class SharesScratch:
    "Sends from a buffer that the next bucket of this size writes to, while it is on its way."

    scratch: dict = attrs.field(init=False, factory=dict)

    def reduce(self, bucket):
        key = bucket.flat.numel(), bucket.flat.dtype
        buffer = self.scratch.setdefault(key, torch.empty_like(bucket.flat)).copy_(bucket.flat)
        bucket.flat.copy_((yield AllReduce(buffer)))


@attrs.define
class IgnoresUnused:
    "Fails where a parameter has no gradient on this rank."

    def reduce(self, bucket):
        if not all(bucket.used):
            raise RuntimeError("a parameter was not used")
        bucket.flat.copy_((yield AllReduce(bucket.flat)))


@attrs.define
class NeedsTheWorld:
    def reduce(self, bucket):
        if dist.is_initialized() and bucket.world_size != dist.get_world_size():
            raise RuntimeError("not all ranks are here")
        bucket.flat.copy_((yield AllReduce(bucket.flat)))
"""

HALF = {"tolerance": 2e-3, "sent_bytes": "2 * (p-1)/p * numel * 2"}
SILENT = {"exact": True, "options": [{"name": "speed", "type": int, "default": 1}]}
BYTES = "2 * (p-1)/p * numel * itemsize"
EXACT = {"exact": True, "sent_bytes": BYTES}
ROUGH = {"sent_bytes": BYTES}

# Name: (class, spec's fields, the checks that fail)
ZOO = {
    "right": ("Right", EXACT, ()),
    "feeds_back": ("FeedsBack", ROUGH, ()),
    "forgets_to_divide": ("ForgetsToDivide", EXACT, ("mean",)),
    "differs_by_rank": ("DiffersByRank", EXACT, ("ranks_agree",)),
    "wrong_dtype": ("WrongDtype", EXACT, ("runs",)),
    "wrong_shape": ("WrongShape", EXACT, ("runs",)),
    "leaks": ("Leaks", EXACT, ("memory_is_flat",)),
    "communicates_itself": ("CommunicatesItself", EXACT, ("runs",)),
    "dies_in_native_code": ("DiesInNativeCode", EXACT, ("runs",)),
    "by_bucket_index": ("ByBucketIndex", {"sent_bytes": BYTES}, ("rebuilt_buckets",)),
    "outside_state": ("OutsideState", {"sent_bytes": BYTES}, ("resumes",)),
    "stores_an_inf": ("StoresAnInf", ROUGH, ("non_finite_is_forgotten",)),
    "residual_of_the_average": ("ResidualOfTheAverage", ROUGH, ("residuals_stay_bounded",)),
    "loses_half": ("LosesHalf", ROUGH, ("feedback_sums_up",)),
    "lies_about_its_bytes": ("Gathers", EXACT, ("bytes_as_declared",)),
    "grows": ("Grows", {"exact": True, "sent_bytes": "0"}, ("bytes_as_declared",)),
    "declares_no_bytes": ("Right", {"exact": True}, ("bytes_are_declared",)),
    "casts_before_dividing": (
        "CastsBeforeDividing",
        {"tolerance": 2e-3, "sent_bytes": "2 * (p-1)/p * numel * 2"},
        ("huge_gradients",),
    ),
    "draws_globally": ("DrawsFromTheGlobalGenerator", EXACT, ("random_generators",)),
    "asks_by_value": ("AsksByValue", EXACT, ("asks_alike",)),
    "nan_for_zero": ("NanForZero", EXACT, ("zeros_stay_zero",)),
    "forgets_strides": ("ForgetsStrides", EXACT, ("every_kind_has_its_mean",)),
    "hides_an_inf": ("HidesAnInf", EXACT, ("non_finite_reaches_all",)),
    "takes_more": ("TakesMore", EXACT, ("factory_takes_the_options",)),
    "says_nothing": (
        "TakesMore",
        EXACT | {"options": [{"name": "speed", "type": int, "default": 1}]},
        ("options_are_documented",),
    ),
    "shares_scratch": ("SharesScratch", EXACT, ("many_buckets",)),
    "fails_where_unused": ("IgnoresUnused", EXACT, ("unused_parameters",)),
    "needs_the_world": ("NeedsTheWorld", EXACT, ("subgroups",)),
    "blocks": ("Blocks", EXACT, ("runs",)),
}
