"""Averagers, one right and the others wrong on purpose. The text is a plugin's; see zoo.py."""

import attrs

from commhub import AllReduce

PERIOD = 4


@attrs.define(slots=False)
class Averages:
    """The mean of the parameters after every fourth step."""

    def prepare(self, setup):
        self.names = setup.names
        self.everyone = setup.partition([list(range(setup.world_size))])

    def due(self, step):
        return self.everyone if step % PERIOD == PERIOD - 1 else None

    def reduce(self, bucket):
        bucket.flat.copy_((yield AllReduce(bucket.flat)))


@attrs.define(slots=False)
class CountsQuestions(Averages):
    """Due at every fourth question, where a step may be asked about more than once, or not at all."""

    asked: int = attrs.field(init=False, default=0)

    def due(self, step):
        self.asked += 1
        return self.everyone if self.asked % PERIOD == 0 else None


@attrs.define(slots=False)
class SkipsTheFirst(Averages):
    """Leaves the first average out, because ranks begin alike."""

    def reduce(self, bucket):
        if bucket.step >= PERIOD:
            yield from Averages.reduce(self, bucket)


@attrs.define(slots=False)
class TakesTurns(Averages):
    """Averages every other parameter in turn, and does not say that it is partial."""

    def reduce(self, bucket):
        turn = bucket.step // PERIOD % 2
        for name, segment in zip(bucket.names, bucket.segments, strict=True):
            if bucket.group is None or self.names.index(name) % 2 == turn:
                segment.copy_((yield AllReduce(segment)))


@attrs.define(slots=False)
class AddsUp(Averages):
    """Forgets to divide."""

    def reduce(self, bucket):
        bucket.flat.copy_((yield AllReduce(bucket.flat, op="sum")))


@attrs.define(slots=False)
class ReplacesMemory(Averages):
    """Gives every parameter new memory, where optimizers and DDP's buckets know the old."""

    def reduce(self, bucket):
        yield from Averages.reduce(self, bucket)
        for parameter, average in zip(bucket.parameters, bucket.gradients, strict=True):
            parameter.data = average.clone()
