"""Going on from what was saved, on all ranks or on none. A hook that the schedule asks for is prepared beforehand."""

from __future__ import annotations

from typing import TYPE_CHECKING

from commhub.registry._recipe import choose
from commhub.training.saving._phases import Phases
from commhub.training.saving._saving import check_hook, fit, restore

if TYPE_CHECKING:
    from collections.abc import Callable

    from commhub.training.saving._saving import Part

    from ._running import Running
    from ._schedule import Schedule


def load_alone(running: Running, schedule: Schedule, take: Callable[[int, int], Part]) -> None:
    """Go on, on this rank alone, which calls for itself; the arguments are those of ``load``."""
    running.check_usable()
    session = running.session
    part = take(session.engine.rank, session.engine.world_size)
    check_hook(part, session.chosen, session.target.part)
    _go_on(running, schedule, fit(part, session.engine.state))


def load(running: Running, schedule: Schedule, take: Callable[[int, int], Part]) -> None:
    """Check what every rank takes, meet, then change; collective.

    Args:
        running: what goes on.
        schedule: which hook is due at the step that is gone back to, or on to.
        take: given rank and world size, finds what this rank goes on from.

    Raises:
        CommhubError: as ``Phases.phase``.
    """
    former = running.session
    phases = Phases(former.target, "load")
    so = "Nothing was changed on any rank."
    with phases.phase(so) as facts:
        running.check_usable()
        part = take(phases.rank, phases.size)
        text = schedule.due(part.step)
        check_hook(part, former.chosen if text is None else choose(text, {}), former.target.part)
        facts.update({"checkpoint": part.source, "step": part.step, "hook": text})
    session = former if text is None else running.start(lambda: choose(text, {}), "load", loading=True)
    try:
        with phases.phase(so):
            part = fit(part, session.engine.state)
            if former.timetable is not None:
                former.timetable.join()
    except BaseException:
        if session is not former:
            session.stop()
        raise
    with phases.phase(more=False):
        if session is not former:
            running.install(session, loading=True)
            running.announce("swapped")
        _go_on(running, schedule, part)


def _go_on(running: Running, schedule: Schedule, part: Part) -> None:
    session = running.session
    if session.timetable is not None:
        session.timetable.forget()
    restore(part, session.engine.state)
    session.engine.resume(part.step)
    schedule.drop(part.step)
