"""What one rank does: ``page.py PACKAGE FOLDER RUN...`` runs the Python blocks of pages, those of each as one script.

A run is ``NAME:ARGUMENTS:PAGE``: the subfolder in which the script runs, and what its command line says.
"""

import contextlib
import os
import re
import sys
import traceback
from pathlib import Path

PACKAGE, FOLDER, RUNS = sys.argv[1], Path(sys.argv[2]).resolve(), sys.argv[3:]
RANK = os.environ["LOCAL_RANK"]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.S | re.M)
OTHER = {
    "import lightning as L": "import pytorch_lightning as L",
    "from lightning.pytorch.": "from pytorch_lightning.",
    "import commhub_lightning\n": "import commhub_lightning.pytorch_lightning\n",
    "from commhub_lightning import": "from commhub_lightning.pytorch_lightning import",
}
"""What a script for the other package says instead, as the guide has it."""


def run(page):
    """How many blocks there were; or what went wrong."""
    text, namespace = page.read_text(encoding="utf-8"), {"__name__": "__main__"}
    if PACKAGE == "pytorch_lightning":
        for ours, theirs in OTHER.items():
            text = text.replace(ours, theirs)
    found = list(BLOCK.finditer(text))
    try:
        for match in found:
            line = text[: match.start(1)].count("\n")
            exec(compile("\n" * line + match[1], page.name, "exec"), namespace)
    except Exception:
        return traceback.format_exc()
    return str(len(found))


def main():
    for each in RUNS:
        name, arguments, page = each.split(":", 2)
        folder = FOLDER / name
        folder.mkdir(parents=True, exist_ok=True)
        os.chdir(folder)
        sys.argv = ["train.py", *arguments.split()]
        with Path(f"said-{arguments}-{RANK}").open("w") as said, contextlib.redirect_stdout(said):
            told = run(Path(page))
        Path(f"told-{arguments}-{RANK}").write_text(told)


if __name__ == "__main__":
    main()
