"""Hooks that are right as long as DDP does nothing unusual. The text is a plugin's; see zoo.py."""

from collections import Counter
from typing import ClassVar

import attrs
import torch
import torch.distributed as dist

from commhub import AllReduce


@attrs.define(slots=False)
class SharesScratch:
    """Sends from a buffer that the next bucket of this size writes to, while it is on its way."""

    scratch: dict = attrs.field(init=False, factory=dict)

    def reduce(self, bucket):
        key = bucket.flat.numel(), bucket.flat.dtype
        buffer = self.scratch.setdefault(key, torch.empty_like(bucket.flat)).copy_(bucket.flat)
        bucket.flat.copy_((yield AllReduce(buffer)))


@attrs.define
class IgnoresUnused:
    """Fails where a parameter has no gradient on this rank."""

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


@attrs.define
class DividesByTheWorld:
    """Divides by all ranks, also where some have run out of inputs."""

    def reduce(self, bucket):
        total = yield AllReduce(bucket.flat, op="sum")
        bucket.flat.copy_(total.mul_(1.0 / bucket.world_size))


@attrs.define(slots=False)
class CountsBackwards:
    """Takes the mean over the backward passes too, of which accumulation has several in a step."""

    passes: Counter = attrs.field(init=False, factory=Counter)

    def prepare(self, setup):
        for name, parameter in zip(setup.names, setup.parameters, strict=False):  # a simulation has none
            handle = parameter.register_post_accumulate_grad_hook(lambda _, name=name: self.passes.update([name]))
            setup.at_end(handle.remove)

    def reduce(self, bucket):
        for name, segment in zip(bucket.names, bucket.segments, strict=True):
            segment.div_(max(1, self.passes.pop(name, 0)))
        bucket.flat.copy_((yield AllReduce(bucket.flat)))


@attrs.define(slots=False)
class StaysBusy:
    """Guards itself against being entered twice, and forgets that a generator may be closed half-way."""

    busy: ClassVar[set] = set()

    def reduce(self, bucket):
        key = bucket.rank, bucket.names
        if key in self.busy:
            raise RuntimeError("this bucket is on its way already")
        self.busy.add(key)
        bucket.flat.copy_((yield AllReduce(bucket.flat)))
        self.busy.remove(key)
