"""Steps as a trace in the format that Chrome (``chrome://tracing``) and ui.perfetto.dev read.

A rank is a process of the trace. It has a track for training, computing or blocked, and one for each bucket, on which
its phases follow one another; so buckets that overlap in time lie below one another. Times are microseconds since
1970, by each rank's own clock: the traces of several ranks can be put into one.
"""

from __future__ import annotations

import json
import os
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

    from ._records import BucketRecord
    from ._timeline import StepRecord

_TRACKS = {"training": 0, "gradients": 1, "parameters": 100_000, "word": 200_000}
"""Where the tracks of each sort begin: their numbers are their order from the top."""
_CALLED = {"gradients": "bucket", "parameters": "average", "word": "word"}


def trace(steps: Sequence[StepRecord], rank: int, *, hook: str = "") -> dict[str, Any]:
    """The trace of one rank's steps, as JSON has it.

    Args:
        steps: the oldest first.
        rank: whose they are.
        hook: what to call the process, beside its rank.
    """
    since_1970 = time.time() - time.monotonic()
    events = [*_training(steps), *(event for step in steps for event in _of_step(step))]
    tracks = {event.pop("track"): event["tid"] for event in events}
    for event in events:
        event["ts"] = round((event["ts"] + since_1970) * 1e6, 3)
        if "dur" in event:
            event["dur"] = round(event["dur"] * 1e6, 3)
        event["pid"] = rank
    names: list[tuple[str, int, dict[str, Any]]] = [
        ("process_name", 0, {"name": f"rank {rank}" + (f": {hook}" if hook else "")})
    ]
    names += [("process_sort_index", 0, {"sort_index": rank})]
    for track, tid in sorted(tracks.items(), key=lambda pair: pair[1]):
        names += [("thread_name", tid, {"name": track}), ("thread_sort_index", tid, {"sort_index": tid})]
    meta = [{"ph": "M", "pid": rank, "tid": tid, "name": name, "args": args} for name, tid, args in names]
    return {"displayTimeUnit": "ms", "traceEvents": [*meta, *events]}


def merged(traces: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """The traces of several ranks in one."""
    return {"displayTimeUnit": "ms", "traceEvents": [event for one in traces for event in one["traceEvents"]]}


def write(path: Path, made: dict[str, Any]) -> None:
    """Write a trace in place of what the file held: as a whole or not at all.

    Raises:
        OSError: if it cannot be written.
    """
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        draft.write_text(json.dumps(made), encoding="utf-8")
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def _training(steps: Sequence[StepRecord]) -> Iterator[dict[str, Any]]:
    """What training did from the first bucket to the end of the last step."""
    if not steps:
        return
    at = steps[0].began
    for step in steps:
        about = {"step": step.step}
        for start, end in step.blocked:
            if start > at:
                yield _slice("training", 0, "compute", at, start, about)
            yield _slice("training", 0, "blocked", max(start, at), end, about)
            at = max(at, end)


def _of_step(step: StepRecord) -> Iterator[dict[str, Any]]:
    for event in ("began", "ended"):
        yield {
            "track": "training",
            "tid": 0,
            "ph": "i",
            "s": "t",
            "name": f"step {step.step} {event}",
            "ts": getattr(step, event),
        }
    words = 0
    for bucket in step.buckets:
        number = bucket.index
        if bucket.purpose == "word":
            number, words = words, words + 1
        yield from _of_bucket(bucket, number, step.step)


def _of_bucket(bucket: BucketRecord, number: int, step: int) -> Iterator[dict[str, Any]]:
    """A slice from ready to complete, and its phases within."""
    called = f"{_CALLED[bucket.purpose]} {number}"
    tid = _TRACKS[bucket.purpose] + number
    complete = bucket.complete
    if complete is None:  # it has not ended: a step that failed, or that is under way
        return
    about = {
        "step": step,
        "hook": bucket.hook,
        "parameters": list(bucket.names),
        "logical_bytes": bucket.logical_bytes,
        "sent_bytes": sum(stage.sent_bytes for stage in bucket.stages if stage.issued is not None),
    }
    yield _slice(called, tid, f"step {step} {called}", bucket.ready, complete, about)
    begun = bucket.stages[0].encode if bucket.stages else bucket.decode
    if begun is not None:
        yield _slice(called, tid, "ready", bucket.ready, begun[0], {"step": step})
    for index, stage in enumerate(bucket.stages):
        what = {"step": step, "stage": index}
        yield _slice(called, tid, "encode", *stage.encode, what)
        if stage.issued is None:
            break
        yield _slice(called, tid, "waits for its turn", stage.encode[1], stage.issued, what)
        if stage.landed is None:
            break
        sent = {
            "collectives": list(stage.kinds),
            "payload_bytes": stage.payload_bytes,
            "sent_bytes": stage.sent_bytes,
        }
        name = "enqueue" if bucket.enqueued else "on the wire"
        yield _slice(called, tid, name, stage.issued, stage.landed, what | sent)
    if bucket.decode is not None:
        yield _slice(called, tid, "decode", *bucket.decode, {"step": step})
        yield _slice(called, tid, "waits for its turn", bucket.decode[1], complete, {"step": step})


def _slice(track: str, tid: int, name: str, start: float, end: float, about: dict[str, Any]) -> dict[str, Any]:
    return {
        "track": track,
        "tid": tid,
        "ph": "X",
        "name": name,
        "cat": "commhub",
        "ts": start,
        "dur": max(0.0, end - start),
        "args": about,
    }
