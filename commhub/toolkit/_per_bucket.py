"""Something that a hook makes for each bucket, and keeps for as long as DDP does not rebuild its buckets."""

from __future__ import annotations

from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

    from commhub.protocol._bucket import Bucket

T = TypeVar("T")


class PerBucket(Generic[T]):
    """What ``make(bucket)`` returned for each bucket: a layout, messages to be filled again in each step.

    It is made once for a list of parameter names, and once more if the ranks that average have changed. DDP rebuilds
    its buckets after the first step; what was made for a bucket that shares a parameter is dropped then. State does
    not belong here: it is kept by parameter name, in ``Setup.state``.

    Args:
        make: called with a bucket; what it returns must depend on the bucket's names, parameters, rank and world
            size alone, never on the gradients.

    Attributes:
        made: what there is, by the buckets' names.
    """

    def __init__(self, make: Callable[[Bucket], T]) -> None:
        self._make = make
        self._ranks: dict[tuple[str, ...], tuple[int, int]] = {}
        self.made: dict[tuple[str, ...], T] = {}

    def __getitem__(self, bucket: Bucket) -> T:
        names, ranks = bucket.names, (bucket.rank, bucket.world_size)
        if self._ranks.get(names) != ranks:
            for other in [other for other in self.made if not set(names).isdisjoint(other)]:
                del self.made[other], self._ranks[other]
            self.made[names], self._ranks[names] = self._make(bucket), ranks
        return self.made[names]
