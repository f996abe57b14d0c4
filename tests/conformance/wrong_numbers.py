"""Hooks whose numbers are wrong, or what they ask for. The text of these modules is a plugin's; see zoo.py."""

import ctypes
import threading

import attrs
import torch
import torch.distributed as dist

import commhub
from commhub import AllGather, AllReduce, ReduceScatter


@attrs.define
class Right:
    """The mean."""

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
class LeavesTheResult:
    """What a driver that works in place lets pass."""

    def reduce(self, bucket):
        yield AllReduce(bucket.flat)


@attrs.define
class UsesThePayloadAgain:
    def reduce(self, bucket):
        size = bucket.flat.abs().sum().view(1)
        sizes = yield AllGather(size)
        mean = yield AllReduce(bucket.flat)
        bucket.flat.copy_(mean * (size / size) * (sizes.sum() / sizes.sum()))


@attrs.define
class WrongDtype:
    def reduce(self, bucket):
        bucket.flat = (yield AllReduce(bucket.flat)).double()


@attrs.define
class WrongShape:
    def reduce(self, bucket):
        bucket.flat = (yield AllReduce(bucket.flat))[:-1]


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
        ctypes.string_at(0)
        yield from ()


@attrs.define
class Gathers:
    """Every rank's gradient to every rank."""

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
    """Averages gradients as if they were contiguous."""

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
    """A rank sends more, the more ranks there are."""

    def reduce(self, bucket):
        yield AllReduce(torch.zeros(bucket.world_size * 2048))
        bucket.flat.copy_((yield AllReduce(bucket.flat)))


@attrs.define
class TableOfPairs:
    """Also sums sixteen numbers for every pair of ranks, which is nothing as long as there are eight."""

    def reduce(self, bucket):
        yield AllReduce(torch.zeros(16 * bucket.world_size**2), op="sum")
        bucket.flat.copy_((yield AllReduce(bucket.flat)))


@attrs.define
class OneBitPerRank:
    """Tells with one bit of an int64 which ranks have a gradient: 63 ranks have one to give."""

    def reduce(self, bucket):
        mine = (1 << bucket.rank) if bucket.flat.any() else 0
        yield AllReduce(torch.tensor([mine]), op="sum")
        bucket.flat.copy_((yield AllReduce(bucket.flat)))


@attrs.define
class NotesTheLargest:
    """Looks for the largest element of each gradient, where there may be none."""

    largest: float = attrs.field(init=False, default=0.0)

    def reduce(self, bucket):
        self.largest = max(float(segment.abs().max()) for segment in bucket.segments)
        bucket.flat.copy_((yield AllReduce(bucket.flat)))


@attrs.define
class FloorUnderTheScale:
    """Sends signs times a scale that is never less than 1e-8."""

    def reduce(self, bucket):
        for segment in bucket.segments:
            if segment.numel():
                segment.copy_(segment.sgn() * segment.abs().mean().clamp(min=1e-8))
        bucket.flat.copy_((yield AllReduce(bucket.flat)))


@attrs.define
class PlacesAsFloats:
    """Sends the largest elements first, with their places in the same dtype, which a narrow wire rounds."""

    def reduce(self, bucket):
        order = bucket.flat.abs().argsort(descending=True)
        values, places = yield (AllGather(bucket.flat[order]), AllGather(order.float()))
        wide = torch.promote_types(values.dtype, torch.float32)
        total = torch.zeros(bucket.flat.numel(), dtype=wide)
        bucket.flat.copy_(total.index_add_(0, places.long(), values.to(wide)) / bucket.divisor)


@attrs.define
class FailsUnderAWire:
    """Is not made for a wire, and says something else."""

    def prepare(self, setup):
        if setup.wire is not None:
            raise commhub.HookOptionError("3 is no size of a group.")

    def reduce(self, bucket):
        bucket.flat.copy_((yield AllReduce(bucket.flat)))


@attrs.define
class TurnsRound:
    """Gives the direction of descent, which the optimizer turns round once more."""

    def reduce(self, bucket):
        bucket.flat.copy_(-(yield AllReduce(bucket.flat)))


@attrs.define(slots=False)
class ScattersSums(Right):
    """The mean where it is whole, and the sum of each part."""

    def reduce_scatter(self, bucket):
        bucket.shard.copy_((yield ReduceScatter(bucket.flat, op="sum")))
