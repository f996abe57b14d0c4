"""The child's side of `commhub doctor`: load one plugin's specs in this process and report as JSON.

A plugin that prints, exits or imports half the world does so here, where nobody else is harmed.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from typing import Any

from commhub._errors import PluginError
from commhub._index import Claim
from commhub._plugins import load_specs

__all__ = ["probe"]


def probe(job: dict[str, Any]) -> None:
    """Load the specs that the claims of `job` point at, and write what was found to standard output."""
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
