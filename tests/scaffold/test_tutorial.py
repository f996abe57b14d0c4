"""docs/tutorial.md does what it says, command by command, in an empty environment."""

import doctest
import os
import re
import shlex
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(
    not os.environ.get("COMMHUB_EVERY_CHECK"),
    reason="half a minute of commands, for which make test has no time: .ci/run sets COMMHUB_EVERY_CHECK",
)
PAGE = (Path(__file__).parents[2] / "docs/tutorial.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"^```(console|diff|python)\n(.*?)^```$", re.S | re.M)
ALLREDUCE = ("pyproject.toml", "README.md", "LICENSE", "commhub_allreduce")
# What the page's commands need where nothing can be downloaded.
OFFLINE = {
    "python -m pip install": "python -m pip install --no-index --no-build-isolation",
    "python -m build": "python -m build --no-isolation",
}


def run(clean, block):
    """Run the commands of a block, and compare what they print with what it shows, if it shows anything."""
    printed = {}
    for part in re.split(r"^\$ ", block, flags=re.M)[1:]:
        command, _, shown = part.partition("\n")
        words = command
        for online, offline in OFFLINE.items():
            words = words.replace(online, offline)
        printed[command] = clean.run(*shlex.split(words))
        options = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
        assert not shown or doctest.OutputChecker().check_output(shown, printed[command], options), printed[command]
    return printed


def edit(folder, block):
    """Replace lines as the diff says; each stands once in its file."""
    for line in block.splitlines(keepends=True):
        if line.startswith("--- "):
            path = folder / line.removeprefix("--- ").strip()
        elif line.startswith("-"):
            old = line[1:]
        else:
            text = path.read_text()
            assert text.count(old) == 1, old
            path.write_text(text.replace(old, line[1:]))


def test_the_tutorial_works_from_its_first_command_to_its_last(clean):
    printed = {}
    clean.install(*(f"plugins/commhub-allreduce/{name}" for name in ALLREDUCE))
    for language, block in BLOCK.findall(PAGE):
        if language == "console":
            printed |= run(clean, block)
        elif language == "diff":
            edit(clean.work, block)
        elif "class MyHook" in block:
            assert (clean.work / "commhub-my-hook/commhub_my_hook/_hook.py").read_text().endswith(block)
        else:
            assert clean.run("python", "-c", block).split("\n")[0] in block
    readme = (clean.work / "commhub-my-hook/README.md").read_text()
    (example,) = re.findall(r"^```pycon\n(.*?)^```$", readme, re.S | re.M)
    (clean.work / "example.txt").write_text(f">>> import commhub\n{example}")
    clean.run("python", "-m", "doctest", "example.txt")
    (table,) = [text for command, text in printed.items() if command.startswith("commhub bench")]
    assert re.search(r"^my_hook .* 2\.00x ", table, re.M)
    assert sorted(path.suffix for path in clean.work.glob("commhub-my-hook/dist/*")) == [".gz", ".whl"]
