"""Hooks inside others: one made by name, an averager by itself, and an exchange that keeps to a subgroup."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs

from ._collectives import Collective
from ._relay import relay

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from torch import Tensor

    from ._bucket import Bucket
    from ._collectives import Subgroup
    from ._hook import Averager, Exchange, Hook, Request
    from ._setup import Setup


class LocalSteps:
    """What an averager that was registered by itself stands behind: gradients stay each rank's own."""

    def __init__(self, averager: Averager) -> None:
        self.averager = averager

    def prepare(self, setup: Setup) -> None:
        """Put the averager on its timetable."""
        setup.average(self.averager)

    def reduce(self, bucket: Bucket) -> Exchange:  # noqa: ARG002 - the gradient stays as it is
        """Yield nothing."""
        yield from ()


class InnerHook:
    """A hook made by name for use inside another: it works within the subgroup of the bucket it is given.

    ``commhub.create`` returns it. Everything but ``prepare`` and ``reduce`` is the made hook's own.
    """

    def __init__(self, hook: Hook, name: str) -> None:
        self._hook = hook
        self._name = name

    def prepare(self, setup: Setup) -> None:
        """Prepare the hook with a memory of its own."""
        prepare = getattr(self._hook, "prepare", None)
        if prepare is not None:
            prepare(setup.inner(self._name))

    def reduce(self, bucket: Bucket) -> Exchange:
        """The hook's exchange, its collectives confined to ``bucket.group``."""
        bucket.enter()
        exchange = self._hook.reduce(bucket)
        return exchange if bucket.group is None else confine(exchange, bucket.group)

    @property
    def extend(self) -> Callable[[Setup], None] | None:
        """The hook's own ``extend``, with its memory; ``None`` where it has none."""
        own = getattr(self._hook, "extend", None)
        return None if own is None else lambda setup: own(setup.inner(self._name))

    @property
    def made(self) -> tuple[str, Hook]:
        """The name it was made by, and the hook."""
        return self._name, self._hook

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # copying and unpickling ask for these before there is a hook to ask
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self._hook, name)

    def __repr__(self) -> str:
        return repr(self._hook)


def confine(exchange: Exchange, group: Subgroup) -> Exchange:
    """The same exchange, with every collective that names no subgroup confined to ``group``."""

    def within(request: Collective) -> Collective:
        confined = isinstance(request, Collective) and request.group is None
        return attrs.evolve(request, group=group) if confined else request

    def stage(requests: tuple[Collective, ...]) -> Generator[Request, Any, tuple[Tensor, ...]]:
        results: tuple[Tensor, ...] = yield tuple(map(within, requests))
        return results

    return relay(exchange, stage)


@attrs.frozen(eq=False)
class Confined:
    """What reduces buckets within one group, or among all ranks."""

    _whole: Hook
    _group: Subgroup | None

    def reduce(self, bucket: Bucket) -> Exchange:
        """The exchange, its collectives confined to the group."""
        exchange = self._whole.reduce(bucket)
        return exchange if self._group is None else confine(exchange, self._group)
