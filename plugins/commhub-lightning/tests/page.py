"""What one rank does: ``page.py FOLDER PAGE...`` runs the Python blocks of each page in their order, as one script."""

import os
import re
import sys
import traceback
from pathlib import Path

FOLDER, PAGES = Path(sys.argv[1]), [Path(page).resolve() for page in sys.argv[2:]]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.S | re.M)


def run(page):
    """How many blocks there were; or what went wrong."""
    text, namespace = page.read_text(encoding="utf-8"), {"__name__": "__main__"}
    found = list(BLOCK.finditer(text))
    try:
        for match in found:
            line = text[: match.start(1)].count("\n")
            exec(compile("\n" * line + match[1], page.name, "exec"), namespace)
    except Exception:
        return traceback.format_exc()
    return str(len(found))


def main():
    FOLDER.mkdir(exist_ok=True)
    os.chdir(FOLDER)
    for page in PAGES:
        Path(f"{page.parent.name}-{page.stem}-rank{os.environ['LOCAL_RANK']}.told").write_text(run(page))


if __name__ == "__main__":
    main()
