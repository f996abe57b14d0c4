"""No communication at all."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import attrs

if TYPE_CHECKING:
    from commhub import Bucket, Exchange, Setup

logger = logging.getLogger("commhub")


@attrs.frozen
class Noop:
    """Leave every rank its own gradient, undivided, so that ranks drift apart.

    It shows how fast training would be if communication cost nothing; it is no way to train.
    """

    def prepare(self, setup: Setup) -> None:
        """Say on rank 0 what this hook does to a training run."""
        if setup.rank == 0:
            logger.warning("noop: gradients are not averaged and ranks drift apart; use it to measure headroom only")

    def reduce(self, bucket: Bucket) -> Exchange:  # noqa: ARG002 - the gradient stays as it is
        """Yield nothing."""
        yield from ()
