"""The code blocks of the pages that need the frameworks, one page after the other, as a reader would type them."""

import os
import re
from pathlib import Path

ROOT = Path(__file__).parents[4]
PAGES = {
    "accelerate": "docs/frameworks-accelerate.md",
    "transformers": "docs/frameworks-transformers.md",
    "readme": "plugins/commhub-accelerate/README.md",
}
_BLOCK = re.compile(r"^<!-- not run: here[^>]* -->\n```python\n(?P<code>.*?)^```$", re.S | re.M)


def _scenario(name, page):
    def scenario(me):
        folder = me.folder / f"docs-{name}"
        folder.mkdir(exist_ok=True)
        before = os.getcwd()
        os.chdir(folder)
        try:
            text = (ROOT / page).read_text(encoding="utf-8")
            namespace, count = {"__name__": "__main__"}, 0
            for block in _BLOCK.finditer(text):
                lines = text[: block.start("code")].count("\n")
                exec(compile("\n" * lines + block["code"], page, "exec"), namespace)
                count += 1
        finally:
            os.chdir(before)
        return count

    scenario.__name__ = f"docs_{name}"
    return scenario


first = tuple(_scenario(name, page) for name, page in PAGES.items())
