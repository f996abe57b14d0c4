"""A hook's ``reduce`` that fails as planned."""

from __future__ import annotations

from typing import Any


def faulty(reduce: Any, step: int) -> Any:
    """The method, but for the buckets of one step, in which a ZeroDivisionError ends it."""

    def failing(self: Any, bucket: Any) -> Any:
        if bucket.step == step:
            raise ZeroDivisionError("planned")
        yield from reduce(self, bucket)

    return failing
