"""A step's time and bytes under one hook, from what was measured or given of the model, the hook and the network."""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs

from ._replay import Bucket, Stage, Step, play

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ._alone import BucketCost
    from ._backward import Backward
    from ._fabric import Fabric


@attrs.frozen(kw_only=True)
class Prediction:
    """A step under one hook.

    Attributes:
        seconds: what it takes.
        exposed: for how long of that training does nothing but wait.
        sent_bytes: what a rank sends.
    """

    seconds: float
    exposed: float
    sent_bytes: float


def predict(
    backward: Backward, costs: Sequence[BucketCost], fabric: Fabric, *, cores: float, stretch: float = 1.0
) -> Prediction:
    """Put a step together and play it through.

    Args:
        backward: the model's own step, measured with as many ranks on a host as there will be.
        costs: the hook's, for each of its buckets, measured likewise.
        fabric: the network.
        cores: that a rank has, over those that its training alone keeps busy; at least 1.
        stretch: how many times as long the model computes, over ``backward``.
    """
    buckets = tuple(
        Bucket(
            ready=bucket.seconds * stretch,
            stages=tuple(
                Stage(work=stage.seconds, flights=tuple(fabric.flight(one) for one in stage.asked))
                for stage in cost.stages
            ),
            decode=cost.decode,
        )
        for bucket, cost in zip(backward.buckets, costs, strict=True)
    )
    word = fabric.word() if any(bucket.stages for bucket in buckets) else 0.0
    played = play(Step(buckets=buckets, computed=backward.seconds * stretch, word=word, cores=max(1.0, cores)))
    return Prediction(seconds=played.seconds, exposed=played.exposed, sent_bytes=sum(cost.sent_bytes for cost in costs))
