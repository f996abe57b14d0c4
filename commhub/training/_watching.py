"""What users see of a hook while it runs: each collective, the last steps, figures for their logger."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from commhub._errors import RegistrationError, described
from commhub._printable import shown
from commhub.drivers._observers import Observer
from commhub.drivers._trace import trace, write

from ._reporting import Report, interval, receiver

if TYPE_CHECKING:
    from collections.abc import Callable

    from commhub.drivers._observers import After, Before
    from commhub.drivers._timeline import StepRecord

    from ._running import Running


class Watched:
    """A registration's part for whoever looks on; see ``Registration``."""

    _running: Running

    def observe(self, before: Before | None = None, after: After | None = None) -> Callable[[], None]:
        """See every collective that a hook asks for, and its results; return a function that ends this.

        ``before(bucket, requests)`` is called with the ``Collective`` values of a stage as the hook asks for them,
        before they are averaged, cast and sent; ``after(bucket, requests, results)`` with the tensors that the hook
        is given for them, in the same order. Between the two lies the time that the stage took; ``requests`` are the
        same tuple in both. Every bucket of a step is seen and every average of parameters, on this rank, whatever
        hook is swapped in, until ``remove``, another registration, or the function that is returned. What commhub
        itself asks the ranks (whether a step ended well, whether they train the same) is not.

        They are called in the thread that runs the hook: on CPU tensors the communication thread, while training goes
        on. On CUDA what they are given is enqueued and not yet there. They look and change nothing, and they are quick,
        since collectives wait for them. A tensor is theirs until they return: who keeps it makes a copy. What they
        raise ends the step as if the hook had raised it, on all ranks. They may refer to the model. A stage that was
        asked for before this call is not shown.

        Raises:
            RegistrationError: if this registration was removed, its model is gone, or these are no functions.
        """
        self._running.check_registered()
        if not all(one is None or callable(one) for one in (before, after)):
            raise RegistrationError(f"observe({shown(before)}, {shown(after)}): give functions.")
        return self._running.observe(Observer(before, after))

    def report(self, every: int = 100, to: object = "log") -> Callable[[], None]:
        """Have figures go to a logger every so many steps; return a function that ends this.

        The figures are numbers by name, means per step since the report before: ``commhub/sent_bytes``,
        ``commhub/logical_bytes``, ``commhub/compression``, ``commhub/encode_seconds``, ``commhub/wait_seconds``,
        ``commhub/decode_seconds``, ``commhub/exposed_seconds`` (for which training stood still) and
        ``commhub/step_seconds`` (which a step took in all). They are this rank's, and nothing is communicated for
        them: each rank that asks gets its own.

        It goes on over ``swap``, ``schedule`` and ``load``, until ``remove``, another registration, or the function
        that is returned. The receiver is called in the training thread, after the step. What it raises is logged and
        harms no exchange; after three times in a row it is told nothing more. It may refer to the model.

        Args:
            every: how many steps lie between two reports.
            to: a function, which is called with the dict of figures and the number of steps so far; ``"log"``, for a
                line of the logger ``commhub``; or a writer with ``add_scalar(name, value, step)``, such as
                TensorBoard's ``SummaryWriter``, which gets the hook too if it has ``add_text``.

        Raises:
            HookOptionError: if ``every`` is no number of steps, or ``to`` takes no figures.
            RegistrationError: if this registration was removed, or its model is gone.
        """
        self._running.check_registered()
        session = self._running.session
        return self._running.add_report(Report(interval(every), receiver(to), session.engine.stats))

    def timeline(self, path: str | os.PathLike[str] | None = None) -> tuple[StepRecord, ...]:
        """What happened to each bucket in the last 16 steps, on this rank; as a trace in a file if a path is given.

        The file is in the format of ``chrome://tracing`` and https://ui.perfetto.dev: a process for the rank, with a
        track for training (computing or blocked) and one for each bucket (ready, encode, on the wire, decode). Times
        are the wall clock's, so the ``traceEvents`` of several ranks can be put into one file. On CUDA they are those
        at which the host enqueued the work.

        Nothing is communicated: any rank may call it alone. Each needs a file of its own; ``{rank}`` in the path
        stands for its number among all processes. What the file held is replaced.

        Returns:
            The steps, the oldest first. Each has ``step``, ``began``, ``ended``, the intervals ``blocked`` and
            ``waits``, and ``buckets`` with ``index``, ``names``, ``purpose``, ``ready``, ``stages`` (``kinds``,
            ``payload_bytes``, ``sent_bytes``, ``encode``, ``issued``, ``landed``), ``decode`` and ``complete``, in
            seconds of ``time.monotonic``.

        Raises:
            RegistrationError: if the file cannot be written, or this registration was removed.
        """
        self._running.check_registered()
        session = self._running.session
        steps = session.engine.timeline.steps
        rank = dist.get_rank() if dist.is_initialized() else session.engine.rank
        if path is not None:
            _write(path, trace(steps, rank, hook=str(session)), rank)
        return steps


def _write(path: object, made: dict[str, Any], rank: int) -> None:
    try:
        text = os.fspath(path)  # type: ignore[call-overload]
    except Exception:  # noqa: BLE001 - an object may be of anybody's making
        text = None
    if not isinstance(text, str) or not text:
        raise RegistrationError(f"timeline({shown(path, 80)}): give a path.")
    file = Path(text.replace("{rank}", str(rank)))
    try:
        if not file.parent.is_dir():
            raise RegistrationError(f"timeline: there is no folder {shown(str(file.parent))}. Make it first.")
        write(file, made)
    except (OSError, ValueError) as error:
        raise RegistrationError(f"timeline: {shown(str(file))} cannot be written: {described(error)}") from error
