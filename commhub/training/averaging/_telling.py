"""What users are told of averages that run late, or may."""

from __future__ import annotations

import logging
from typing import Final

logger = logging.getLogger("commhub")

PATIENCE: Final = 64
"""Backward passes after which an average that has not run is told of."""


def advise(hook: str) -> None:
    """Say what only optimizers make possible."""
    logger.warning(
        "%s: parameters are averaged at the next training forward. Where they move between a backward and its "
        "step (sharpness-aware minimisation, averaged weights swapped in), pass optimizer= to register().",
        hook,
    )


def tell_of_delay(due: int, passes: int, *, has_optimizers: bool) -> None:
    """Say that what was due after a step has not run in so many backward passes since."""
    logger.warning(
        "an average of the parameters fell due after step %d and has not run in %d backward passes since. %s",
        due,
        passes,
        "None of the optimizers given to register() has stepped: give the one whose step() is called."
        if has_optimizers
        else "It runs in a forward with gradients in train mode: give optimizer= to register().",
    )
