"""What a hook is: two methods, one of them a generator. Protocols, so that a third party inherits from nothing."""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from ._collectives import Collective, Subgroup

if TYPE_CHECKING:
    from ._bucket import Bucket

Request = Collective | tuple[Collective, ...]
Exchange = Generator[Request, Any, None]
"""What ``reduce`` returns: it yields collectives and is sent a tensor for each (a tuple for a tuple)."""


@runtime_checkable
class Hook(Protocol):
    """Averages one bucket of gradients over the ranks.

    A hook may also have ``prepare(setup: Setup) -> None``, called once at registration. One that steps the optimizer
    in backward has ``steps_optimizer = True``, for whoever runs the training loop: clipping gradients comes too late.
    """

    def reduce(self, bucket: Bucket) -> Exchange:
        """Yield the collectives that average ``bucket`` and leave the result in ``bucket.flat``."""
        ...


@runtime_checkable
class Scatterer(Hook, Protocol):
    """A hook that can also take the place of a reduce-scatter, inside a group that a model is sharded over."""

    def reduce_scatter(self, bucket: Bucket) -> Exchange:
        """Yield the collectives that leave the mean of this rank's part, ``bucket.parts[bucket.rank]``, in ``shard``.

        What ``flat`` holds afterwards does not matter. ``setup.scatters`` says in ``prepare`` that this is called.
        """
        ...


@runtime_checkable
class Averager(Protocol):
    """Averages parameters now and then: a hook on a timetable. The bucket it is given holds parameters.

    It may also have ``prepare(setup: Setup) -> None``, called once at registration, and two attributes that ask for
    more than the parameters, in buckets of their own: ``buffers`` (floating-point buffers) and ``optimizer_state``
    (the optimizers' tensors that have a parameter's shape; in a bucket they are named ``"parameter:key"``). A third,
    ``partial``, says that an average that is due leaves parameters out; the last one, among all ranks, must not.

    One that remembers parameters has ``begin(parameters: Mapping[str, Tensor]) -> None``, and takes them from there and
    not from ``prepare``: weights are often loaded after registration. It is called, not collectively, with the
    parameters by name that the first synchronised step was computed with, before an optimizer uses its gradients; and
    again in the first step after ``load_state_dict`` of the module or a part of it. It may be called several times.
    Where state of the registration is loaded too, before or after the weights, that state counts and ``begin`` is
    not called.

    Parameters that are trained only later, unfrozen or added, are averaged by a plain mean. One that has
    ``extend(setup: Setup) -> None`` reduces them itself from then on: it is called once for them, as ``prepare`` was
    for the others, when they are equal on all ranks. It makes no subgroups.
    """

    def due(self, step: int) -> Subgroup | None:
        """Among whom to average after ``step`` (from 0), or ``None`` for not now; from ``step`` alone."""
        ...

    def reduce(self, bucket: Bucket) -> Exchange:
        """Yield the collectives that average ``bucket`` and leave the result in ``bucket.flat``.

        Those that name no group run among the ranks that ``due`` said.
        """
        ...


def can_scatter(hook: object) -> bool:
    """Whether it can take the place of a reduce-scatter."""
    return callable(getattr(hook, "reduce_scatter", None))


def is_averager(hook: object) -> bool:
    """Whether it averages parameters on a timetable, an averager made by name included."""
    return callable(getattr(hook, "due", None))
