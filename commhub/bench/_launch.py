"""Start the ranks through torch.distributed's own launcher, follow them, and end them all at once.

The ranks run in one launch, hook after hook, so that every hook meets the same warm processes. A hook that
fails ends its processes, and the hooks after it get fresh ones: no failure reaches the next figures.
This process imports no torch.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ._lifeline import Lifeline
from ._machine import threads_per_rank
from ._options import BenchError, Settings

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from ._board import Board

_POLL_SECONDS = 0.05
_GRACE_SECONDS = 5.0


def launch(settings: Settings, board: Board) -> None:
    """Run every hook; ``board`` is told all events, a hook whose ranks died included.

    Raises:
        BenchError: if the ranks could not be started at all, or found that the settings cannot work.
    """
    attempt = 0
    with tempfile.TemporaryDirectory(prefix="commhub-bench-") as name:
        while indexes := board.pending():
            folder = Path(name, str(attempt))
            folder.mkdir()
            _attempt(settings, board, indexes, folder)
            if board.fatal is not None:
                raise BenchError(board.fatal)
            if board.pending() == indexes:
                raise BenchError(
                    f"the ranks could not be started: {_last_words((folder / 'log').read_text(errors='replace'))}"
                )
            attempt += 1


def _attempt(settings: Settings, board: Board, indexes: Sequence[int], folder: Path) -> None:
    """One launch: ends when all its hooks are done or one has failed."""
    (folder / "job.json").write_text(json.dumps({"settings": settings.as_dict(), "indexes": list(indexes)}))
    tail = _Tail(folder / _events(0))
    with Lifeline(folder) as lifeline, _launcher(settings, folder, lifeline) as process:
        while process.poll() is None:
            _forward(tail, board)
            time.sleep(_POLL_SECONDS)
    _forward(tail, board)
    index = board.running()
    if index is not None:
        board.on_event({"kind": "failed", "index": index, "error": _reason(folder, index)})


@contextlib.contextmanager
def _launcher(settings: Settings, folder: Path, lifeline: Lifeline) -> Iterator[subprocess.Popen[bytes]]:
    """Run torchrun in a session of its own: a terminal's Ctrl-C reaches this process alone, which decides."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nnodes=1",
        f"--nproc-per-node={settings.nproc}",
    ]
    command += ["--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1"]
    command += ["--max-restarts=0", f"--log-dir={folder}", "-m", "commhub.bench._rank", str(folder)]
    threads = threads_per_rank(settings.threads, settings.nproc)
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    if sys.platform == "linux":
        # All ranks are on this machine: Gloo needs no host name that resolves.
        environment.setdefault("GLOO_SOCKET_IFNAME", "lo")
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(  # noqa: S603 - our own interpreter and arguments
            command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
    try:
        yield process
    finally:
        lifeline.cut()
        _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the launcher, and with it ranks that are not yet watching their lifeline."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(_GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _forward(tail: _Tail, board: Board) -> None:
    """Hand on what rank 0 says, except why it failed: that may be an echo of what ended another rank."""
    for event in tail.new():
        if event["kind"] != "failed":
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


def _reason(folder: Path, index: int) -> str:
    """Why the hook at ``index`` failed: how a rank died, else what the rank that failed first says."""
    log = (folder / "log").read_text(errors="replace")
    # The launcher's summary. It ends the other ranks with SIGTERM itself.
    for rank, code in re.findall(r"rank\s*: (\d+) .*?exitcode\s*: (-?\d+) ", log, re.DOTALL):
        if int(code) < 0 and -int(code) != signal.SIGTERM:
            return f"rank {rank} was ended by {signal.Signals(-int(code)).name}"
    failures = [
        event
        for path in sorted(folder.glob(_events("*")))
        for event in _Tail(path).new()
        if event["kind"] == "failed" and event["index"] == index
    ]
    if failures:
        return str(min(failures, key=lambda event: float(event["time"]))["error"])
    return _last_words(log)


def _last_words(log: str) -> str:
    """The last line that looks like an exception, else the last line."""
    lines = [line for line in log.splitlines() if line.strip() and not line.startswith("=")]
    errors = [line for line in lines if re.match(r"(\[rank\d+\]: )?[\w.]*(Error|Exception)\b", line)]
    return (errors or lines or ["no reason was given"])[-1]
