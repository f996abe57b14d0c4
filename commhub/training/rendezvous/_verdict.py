"""What becomes of a round in which ranks meet, in the form that it has in their store."""

from __future__ import annotations

import json

import attrs


@attrs.frozen
class Verdict:
    """What became of a round: the same on every rank that took part.

    Attributes:
        brought: by rank, what the ranks brought that had come when it was written.
        waited: how many seconds whoever wrote it was ready to wait.
        left: the rank that was interrupted while it waited, if one was.
    """

    brought: dict[int, str]
    waited: float
    left: int | None

    @classmethod
    def read(cls, text: bytes | None) -> Verdict:
        """From the form it has in the store."""
        waited, left, brought = json.loads(text or b"[0, null, {}]")
        return cls({int(rank): mine for rank, mine in brought.items()}, waited, left)
