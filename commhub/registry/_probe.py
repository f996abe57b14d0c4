"""Loading one plugin's specs in a process of its own, and learning how that went.

A plugin that prints, exits or imports half the world does so there, where nobody is harmed.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import attrs

from commhub._errors import PluginError, described
from commhub._printable import shortened

from ._index import Claim
from ._loading import load_specs

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Finding", "examine", "probe"]

_LIMIT = 120  # seconds; a cold torch import on a slow disk takes a few tens
_TAIL = 10_000  # bytes of what it prints that are kept
_CHILD = (
    "import json, sys; job = json.load(open(sys.argv.pop())); sys.path[:] = job['path']; "
    "from commhub.registry._probe import probe; probe(job)"
)


class Finding(TypedDict):
    """What a child process found out about one spec module.

    Attributes:
        error: why it cannot be used; else ``None``.
        summaries: by hook's name, its one line.
        import_ms: how long loading it took, in milliseconds.
        imports_torch: whether that loaded torch.
        traceback: of the error.
    """

    error: str | None
    summaries: dict[str, str]
    import_ms: float | None
    imports_torch: bool | None
    traceback: str | None


def examine(claims: Sequence[Claim]) -> Finding:
    """Load the spec module that the claims point at, in a child process, and say what was found.

    The child answers in a file, and all that it started ends with it: whatever the plugin does to its descriptors,
    and whoever else holds them.
    """
    with tempfile.TemporaryDirectory(prefix="commhub-doctor-") as name:
        job, report = Path(name, "job"), Path(name, "report")
        job.write_text(json.dumps({"path": sys.path, "claims": list(map(attrs.asdict, claims)), "report": str(report)}))
        code, said = _run([sys.executable, "-c", _CHILD, str(job)])
        try:
            finding: Finding = json.loads(report.read_text())
        except (OSError, ValueError):
            how = (
                f"loading it took longer than {_LIMIT} s"
                if code is None
                else f"its process ended with exit code {code}"
            )
            return _lost(how, said or None)
    return finding


def _run(command: list[str]) -> tuple[int | None, str]:
    """The exit code, ``None`` after the time limit, and the last of what the process printed."""
    child = subprocess.Popen(  # noqa: S603 - this interpreter, and text of our own
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    assert child.stdout is not None
    tail = bytearray()
    reader = threading.Thread(target=_keep_tail, args=(child.stdout.fileno(), tail), daemon=True)
    reader.start()
    try:
        code = child.wait(_LIMIT)
    except subprocess.TimeoutExpired:
        code = None
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
        reader.join(1)
    if not reader.is_alive():  # else somebody who left the session still holds the pipe
        child.stdout.close()
    return code, bytes(tail).decode(errors="backslashreplace")


def _keep_tail(descriptor: int, tail: bytearray) -> None:
    with contextlib.suppress(OSError):
        while chunk := os.read(descriptor, 65536):
            tail += chunk
            del tail[:-_TAIL]


def _lost(error: str, traceback: str | None) -> Finding:
    return Finding(error=error, summaries={}, import_ms=None, imports_torch=None, traceback=traceback)


def probe(job: dict[str, Any]) -> None:
    """The child's side: load the specs that the claims of ``job`` point at, write what was found, and end at once.

    Threads and exit handlers that the plugin left have no say in when that is.
    """
    claims = [Claim(**claim) for claim in job["claims"]]
    error = trace = None
    summaries = {}
    start = time.perf_counter()
    try:
        summaries = {name: spec.summary for name, spec in load_specs(claims).items()}
    except PluginError as err:
        error, trace = str(err), _trace(err.__cause__)
    except BaseException as err:  # noqa: BLE001 - an interrupt, of the plugin's own making
        error, trace = f"loading it raised {described(err)}", _trace(err)
    spent = round((time.perf_counter() - start) * 1000, 1)
    found = {
        "error": error,
        "summaries": summaries,
        "import_ms": spent,
        "imports_torch": "torch" in sys.modules,
        "traceback": trace,
    }
    with open(job["report"], "w") as report:
        report.write(json.dumps(found))
    os._exit(0)


def _trace(error: BaseException | None) -> str | None:
    try:
        return shortened("".join(traceback.format_exception(error)))
    except BaseException:  # noqa: BLE001 - an error may be of anybody's making
        return None
