"""Loading one plugin's specs in a process of its own, and learning how that went.

A plugin that prints, exits or imports half the world does so there, where nobody is harmed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import traceback
from typing import Any, TypedDict

import attrs

from commhub._errors import PluginError

from ._index import Claim
from ._loading import load_specs

__all__ = ["Finding", "examine", "probe"]

_LIMIT = 120  # seconds; a cold torch import on a slow disk takes a few tens
_CHILD = (
    "import json, sys; job = json.load(sys.stdin); sys.path[:] = job['path']; "
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


def examine(claims: list[Claim]) -> Finding:
    """Load the spec module that the claims point at, in a child process, and say what was found."""
    job = json.dumps({"path": sys.path, "claims": [attrs.asdict(claim) for claim in claims]})
    try:
        child = subprocess.run(  # noqa: S603 - this interpreter, and text of our own
            [sys.executable, "-c", _CHILD],
            input=job,
            capture_output=True,
            text=True,
            timeout=_LIMIT,
            check=False,
        )
        finding: Finding = json.loads(child.stdout)
    except subprocess.TimeoutExpired:
        return _lost(f"loading it took longer than {_LIMIT} s", None)
    except ValueError:
        return _lost(f"its process ended with exit code {child.returncode}", child.stderr)
    return finding


def _lost(error: str, traceback: str | None) -> Finding:
    return Finding(error=error, summaries={}, import_ms=None, imports_torch=None, traceback=traceback)


def probe(job: dict[str, Any]) -> None:
    """The child's side: load the specs that the claims of ``job`` point at, and write what was found to stdout."""
    report = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the plugin prints is not the report
    claims = [Claim(**claim) for claim in job["claims"]]
    error = trace = None
    summaries = {}
    start = time.perf_counter()
    try:
        summaries = {name: spec.summary for name, spec in load_specs(claims).items()}
    except PluginError as err:
        error = str(err)
        trace = "".join(traceback.format_exception(err.__cause__))
    spent = round((time.perf_counter() - start) * 1000, 1)
    found = {
        "error": error,
        "summaries": summaries,
        "import_ms": spent,
        "imports_torch": "torch" in sys.modules,
        "traceback": trace,
    }
    with report:
        report.write(json.dumps(found))
