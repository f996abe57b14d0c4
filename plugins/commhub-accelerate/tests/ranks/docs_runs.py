"""The code blocks of the pages that need the frameworks, one page after the other, as a reader would type them."""

import contextlib
import io
import json
import os
import re
import shutil
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file

ROOT = Path(__file__).parents[4]
PAGES = {
    "accelerate": "docs/frameworks-accelerate.md",
    "transformers": "docs/frameworks-transformers.md",
    "peft": "docs/frameworks-peft.md",
    "readme": "plugins/commhub-accelerate/README.md",
}
_BLOCK = re.compile(r"^<!-- not run: here[^>]* -->\n```python\n(?P<code>.*?)^```$", re.S | re.M)


def _run(folder, page):
    """Run a page in a folder; how many blocks it had, and what they printed."""
    folder.mkdir(exist_ok=True)
    before, printed = os.getcwd(), io.StringIO()
    os.chdir(folder)
    try:
        text = (ROOT / page).read_text(encoding="utf-8")
        namespace, count = {"__name__": "__main__"}, 0
        for block in _BLOCK.finditer(text):
            lines = text[: block.start("code")].count("\n")
            with contextlib.redirect_stdout(printed):
                exec(compile("\n" * lines + block["code"], page, "exec"), namespace)
            count += 1
    finally:
        os.chdir(before)
    return count, printed.getvalue()


def _scenario(name, page):
    def scenario(me):
        return _run(me.folder / f"docs-{name}", page)

    scenario.__name__ = f"docs_{name}"
    return scenario


def _checkpoint(folder):
    """The adapter, the optimizer, and what the hook remembers on every rank."""
    ranks = json.loads((folder / "commhub/commhub.json").read_text())["ranks"]
    hook = {place: torch.load(folder / "commhub" / one["file"]) for place, one in enumerate(ranks)}
    optimizer = torch.load(folder / "optimizer.pt", weights_only=True)
    return {"adapter": load_file(folder / "adapter_model.safetensors"), "optimizer": optimizer, "hook": hook}


def docs_peft_resumed(me):
    """The page's script is started again, in new processes, after a run that was ended before its last checkpoint."""
    whole, ended = me.folder / "docs-peft", me.folder / "docs-peft-ended"
    if me.rank == 0:
        shutil.copytree(whole, ended)
        shutil.rmtree(ended / "adapter/checkpoint-4")
    dist.barrier()
    _run(ended, PAGES["peft"])
    return [_checkpoint(folder / "adapter/checkpoint-4") for folder in (whole, ended)]


first = tuple(_scenario(name, page) for name, page in PAGES.items())
second = (docs_peft_resumed,)
