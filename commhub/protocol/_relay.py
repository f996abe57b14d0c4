"""Passing an exchange on, with what it asks for changed on the way out and what it is sent changed on the way back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from commhub._errors import HookError

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Sequence

    from torch import Tensor

    from ._collectives import Collective
    from ._hook import Exchange, Request

    Stage = Callable[[tuple[Collective, ...]], Generator[Request, Any, Sequence[Tensor]]]


def relay(exchange: Exchange, stage: Stage) -> Exchange:
    """Drive the exchange of a hook inside another one; ``yield from`` it in the outer hook's ``reduce``.

    Whatever ends this, an error or a driver that gives up, closes ``exchange``.

    Args:
        exchange: the inner hook's, as its ``reduce(bucket)`` returned it.
        stage: a generator function, called with what ``exchange`` asks for each time: a tuple of collectives, of one
            where it asked for a single one. It yields collectives of its own, as often as it likes, and returns a
            tuple (or list) of one tensor for each that it was called with, of that collective's result's shape and
            dtype.

    Raises:
        HookError: if ``stage`` returns anything else. A tensor by itself would be taken for its rows.

    >>> def in_half(asked):
    ...     return (yield tuple(attrs.evolve(one, wire=torch.float16) for one in asked))
    >>> yield from commhub.relay(inner.reduce(bucket), in_half)  # doctest: +SKIP
    """
    answer: Any = None
    try:
        while True:
            try:
                request = exchange.send(answer)
            except StopIteration:
                return
            single = not isinstance(request, tuple)
            asked: Any = (request,) if single else request
            results = yield from stage(asked)
            if not isinstance(results, tuple | list) or len(results) != len(asked):
                found = f"{len(results)} of them" if isinstance(results, tuple | list) else type(results).__name__
                raise HookError(f"the stage of a relay returned {found} for {len(asked)}: return a tuple of results.")
            answer = results[0] if single else tuple(results)
    finally:
        exchange.close()
