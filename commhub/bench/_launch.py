"""Start the ranks through torch.distributed's own launcher, follow them, and end them all at once.

The ranks run in one launch, hook after hook, so that every hook meets the same warm processes. A hook that
fails ends its processes, and the hooks after it get fresh ones: no failure reaches the next figures. The last
processes also time steps of all hooks that did not fail. This process imports no torch.
"""

from __future__ import annotations

import contextlib
import json
import re
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from ._crew import crew
from ._format import printable
from ._hooks import network
from ._hosts import Hosts, NoHostsError
from ._lifeline import Lifeline
from ._options import BenchError, Settings
from ._pytorch import is_pytorchs

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ._board import Board

_POLL_SECONDS = 0.05


def launch(settings: Settings, board: Board) -> None:
    """Run every hook; ``board`` is told all events, a hook whose ranks died included.

    Raises:
        BenchError: if the ranks could not be started at all, or found that the settings cannot work.
    """
    attempt = 0
    with tempfile.TemporaryDirectory(prefix="commhub-bench-") as name, _hosts(settings, board) as (left, hosts):
        while any(board.todo()):
            folder = Path(name, str(attempt))
            folder.mkdir()
            before = board.todo()
            _attempt(left, board, folder, hosts)
            if board.fatal is not None:
                raise BenchError(board.fatal)
            if board.todo() == before:
                raise BenchError(f"the ranks could not be started: {_last_words(_logs(folder))}")
            attempt += 1


@contextlib.contextmanager
def _hosts(settings: Settings, board: Board) -> Iterator[tuple[Settings, Hosts | None]]:
    """Hosts, if they are wanted and can be made; and the settings for ranks, which emulate what is left of the link."""
    if settings.hosts == 1:
        yield settings, None
        return
    hosts = Hosts(settings.hosts, network(settings))
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(hosts)
        except NoHostsError as why:
            theirs = next(filter(is_pytorchs, settings.hooks), None)
            if theirs and settings.emulated:
                raise BenchError(f"no hosts can be made here, and {theirs} communicates past an emulated link") from why
            instead = "the link is emulated" if settings.emulated else "the ranks share this one"
            board.remarks.append(f"No hosts could be made on this machine, so {instead}: {why}.")
            print(printable(board.remarks[-1], sys.stderr), file=sys.stderr, flush=True)
            yield settings, None
            return
        latency = None if hosts.is_delayed else settings.latency
        board.hosts, board.ran = settings.hosts, attrs.evolve(settings, bandwidth=None, latency=latency)
        yield board.ran, hosts


def _attempt(settings: Settings, board: Board, folder: Path, hosts: Hosts | None) -> None:
    """One launch: ends when all its hooks are done or one has failed."""
    indexes, raced = board.todo()
    job = {"settings": settings.as_dict(), "indexes": indexes, "raced": raced}
    (folder / "job.json").write_text(json.dumps(job))
    tail = _Tail(folder / _events(0))
    with Lifeline(folder) as lifeline, crew(settings, folder, lifeline, hosts) as launchers:
        while launchers.is_at_work():
            _forward(tail, board)
            time.sleep(_POLL_SECONDS)
    _forward(tail, board)
    index = board.running()
    if index is not None:
        board.on_event({"kind": "failed", "index": index, "error": _reason(folder, index)})
    elif board.timing.is_under_way:
        board.on_event({"kind": "race failed", "error": _reason(folder, None)})


def _forward(tail: _Tail, board: Board) -> None:
    """Hand on what rank 0 says, except why it failed: that may be an echo of what ended another rank."""
    for event in tail.new():
        if event["kind"] not in ("failed", "race failed"):
            board.on_event(event)


class _Tail:
    """The complete lines that were added to a file of JSON lines since the last look."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0

    def new(self) -> Iterator[dict[str, Any]]:
        if not self._path.exists():
            return
        with self._path.open("rb") as file:
            file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                self._offset += len(line)
                yield json.loads(line)


def _events(rank: int | str) -> str:
    return f"events-{rank}.jsonl"


def _logs(folder: Path) -> str:
    return "\n".join(path.read_text(errors="replace") for path in sorted(folder.glob("log-*")))


def _reason(folder: Path, index: int | None) -> str:
    """Why the hook at ``index`` failed, or the timing: how a rank died, else what the rank that failed first says."""
    log = _logs(folder)
    # The launchers' summaries. They end the other ranks with SIGTERM themselves.
    for rank, code in re.findall(r"\brank\s*: (\d+) (?:(?!\brank\s*:).)*?exitcode\s*: (-?\d+) ", log, re.DOTALL):
        if int(code) < 0 and -int(code) != signal.SIGTERM:
            return f"rank {rank} was ended by {signal.Signals(-int(code)).name}"
    failures = [
        event
        for path in sorted(folder.glob(_events("*")))
        for event in _Tail(path).new()
        if event["kind"] in ("failed", "race failed") and event.get("index") == index
    ]
    if failures:
        return str(min(failures, key=lambda event: float(event["time"]))["error"])
    return _last_words(log)


def _last_words(log: str) -> str:
    """The last line that looks like an exception, else the last line."""
    lines = [line for line in log.splitlines() if line.strip() and not line.startswith("=")]
    errors = [line for line in lines if re.match(r"(\[rank\d+\]: )?[\w.]*(Error|Exception)\b", line)]
    return (errors or lines or ["no reason was given"])[-1]
