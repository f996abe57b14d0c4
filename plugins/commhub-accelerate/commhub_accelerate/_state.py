"""What hooks remember, in the directory of a framework's checkpoint: it is moved, copied and pruned with the rest."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Final

from commhub import CheckpointError

if TYPE_CHECKING:
    from commhub import Registration

_MANIFEST: Final = "commhub.json"

logger = logging.getLogger("commhub")


def folder(checkpoint: str | Path, number: int = 0) -> Path:
    """Where the state of the accelerator's model of that number lies, counted as in its own files' names."""
    return Path(checkpoint) / (f"commhub_{number}" if number else "commhub")


def folders(checkpoint: str | Path) -> set[Path]:
    """Those that hold the state of a hook."""
    found = {path.parent for path in Path(checkpoint).glob(f"commhub*/{_MANIFEST}")}
    return {path for path in found if path.name == "commhub" or path.name.removeprefix("commhub_").isdecimal()}


def load(registration: Registration, directory: Path, *, speaks: bool) -> None:
    """Go on from what was saved in ``directory``; collective. Where nothing was saved, a warning says so.

    Args:
        registration: whose hook.
        directory: what ``folder`` said.
        speaks: whether this rank logs.

    Raises:
        CheckpointError: on every rank, if what is there is damaged, or of another hook or model.
    """
    try:
        registration.load(directory)
    except CheckpointError as error:
        if not (directory / _MANIFEST).exists():
            if speaks:
                logger.warning(
                    "%s: the checkpoint has no state of a hook (%s): this one goes on with what it remembers now.",
                    registration,
                    directory,
                )
            return
        raise CheckpointError(f"{error} To resume without it, remove {directory}.") from error
