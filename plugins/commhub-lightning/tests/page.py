"""What one rank does: ``page.py PAGE FOLDER`` runs the Python blocks of a page, one after the other, as one script."""

import os
import re
import sys
from pathlib import Path

PAGE, FOLDER = Path(sys.argv[1]).resolve(), Path(sys.argv[2])
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.S | re.M)


def main():
    text = PAGE.read_text(encoding="utf-8")
    FOLDER.mkdir(exist_ok=True)
    os.chdir(FOLDER)
    namespace, count = {"__name__": "__main__"}, 0
    for count, match in enumerate(BLOCK.finditer(text), 1):
        line = text[: match.start(1)].count("\n")
        exec(compile("\n" * line + match[1], PAGE.name, "exec"), namespace)
    Path(f"{PAGE.stem}-rank{os.environ['LOCAL_RANK']}.done").write_text(str(count))


if __name__ == "__main__":
    main()
