"""What feeds an engine with gradients, and what a registration asks of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import weakref
    from collections.abc import Callable

    from commhub.training._session import Session
    from commhub.training._trained import Named


class Attachment(Protocol):
    """The one tie between a registration and the gradients of its model.

    It has its own way to learn that gradients are ready: a hook of a DDP model, a call of the user's, a communicator
    that shards are handed to. From then on all of them do the same: ``engine.begin``, ``engine.add`` for each bucket,
    ``engine.end``, and when the averages are where the user reads them ``engine.after_step`` and ``after``. A bucket
    is whatever is averaged in one go: a rank's shards lie in one as well as whole parameters, and what they are called
    in ``parameters`` is what the hook's memory goes by.

    What holds it keeps the registration's thread and groups open; when nothing does any more, they are freed. So it
    holds the registration only where the model holds it, and a model whose code in C++ holds it (a reducer does) it
    refers to weakly.

    Attributes:
        after: called after each step, as long as there is what it belongs to; ``None`` where nobody waits for that.
    """

    after: weakref.WeakMethod[Callable[[], None]] | None

    def parameters(self) -> tuple[Named, ...]:
        """Those whose gradients come now, in an order that is the same on all ranks, for the next hook to prepare for.

        The hook is not yet at work, and may never be.
        """

    def attach(self, session: Session, owner: object) -> None:
        """Feed ``session.engine`` from the next step on, and the one before no more; between steps.

        ``session.target.parameters`` are those that its hook was prepared for. ``owner`` is the registration.
        """

    def detach(self) -> bool:
        """The registration was removed. Whether gradients still come, and need the plain mean that is attached now."""
