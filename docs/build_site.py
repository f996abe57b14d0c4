"""Build the documentation site: ``python docs/build_site.py [FOLDER]``, by default ``docs/_site``.

Its pages are the files that are read in the repository: README.md is the home page, ``docs/*.md``, each package's
README, and a reference that is made from docstrings. Links between them are followed from file to page; a link that
leads nowhere ends the build, and so does any warning of Sphinx.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
_LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)(?P<target>[^)#\s]+)(?P<anchor>#[^)\s]+)?(?=\))")

CONTENTS = {
    "Use": [
        "registration",
        "models",
        "sharded",
        "choosing",
        "hooks",
        "averagers",
        "machines",
        "convergence",
        "migration",
    ],
    "Frameworks": [
        "frameworks",
        "frameworks-torchrun",
        "frameworks-lightning",
        "frameworks-fabric",
        "frameworks-accelerate",
        "frameworks-transformers",
        "frameworks-peft",
        "frameworks-ignite",
        "frameworks-ray",
        "frameworks-slurm",
        "frameworks-kubernetes",
        "frameworks-logging",
    ],
    "Publish": ["tutorial", "writing-a-hook", "conformance", "publishing", "compatibility"],
    "Reference": ["api", "extension-points", "drivers", "changelog", "contributing"],
}


def pages() -> dict[Path, str]:
    """Every file that becomes a page, with the page's name."""
    named = {
        "README.md": "index",
        "CHANGELOG.md": "changelog",
        "CONTRIBUTING.md": "contributing",
        "contrib/README.md": "contrib",
        "commhub/drivers/HOW_IT_WORKS.md": "drivers",
    }
    found = {ROOT / path: name for path, name in named.items()}
    found |= {path: path.stem for path in sorted(DOCS.glob("*.md"))}
    for group in ("plugins", "contrib"):
        found |= {path: f"packages/{path.parent.name}" for path in sorted(ROOT.glob(f"{group}/*/README.md"))}
    return found


def assemble(folder: Path) -> None:
    """Write the pages, and what they link to, as a tree for Sphinx. ValueError for a link that leads nowhere."""
    known = pages()
    for path, name in known.items():
        follow = partial(_follow, path=path, name=name, known=known)
        text = _LINK.sub(follow, path.read_text("utf-8"))
        page = folder / f"{name}.md"
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text(text + _contents() if name == "index" else text, encoding="utf-8")
    listed = [name for names in CONTENTS.values() for name in names]
    listed += [name for name in known.values() if name.startswith("packages/")] + ["index", "contrib"]
    if sorted(listed) != sorted(known.values()):
        there, named = set(known.values()), set(listed)
        raise ValueError(f"in CONTENTS, but no file: {sorted(named - there)}; not in CONTENTS: {sorted(there - named)}")
    shutil.copytree(DOCS / "examples", folder / "examples")


def _follow(link: re.Match[str], *, path: Path, name: str, known: dict[Path, str]) -> str:
    """The same link as seen from the page; a folder or file that is no page leads to the page about it."""
    target = (path.parent / link["target"]).resolve()
    if not target.exists():
        raise ValueError(f"{path.relative_to(ROOT)} links to {link['target']}, which does not exist")
    if target.is_relative_to(DOCS / "examples"):
        return os.path.relpath(target.relative_to(DOCS), Path(name).parent)
    about = {ROOT / "plugins": "hooks", ROOT / "contrib": "contrib"}
    goal = known.get(target) or known.get(target / "README.md") or about.get(target)
    if goal is None:
        raise ValueError(f"{path.relative_to(ROOT)} links to {link['target']}, which is no page of the site")
    return os.path.relpath(f"{goal}.md", Path(name).parent) + (link["anchor"] or "")


def _contents() -> str:
    """The tables of contents, for the side of every page."""
    packages = sorted(name for name in pages().values() if name.startswith("packages/"))
    ours = {f"packages/{path.parent.name}" for path in ROOT.glob("plugins/*/README.md")}
    theirs = [name for name in packages if name not in ours]
    groups = CONTENTS | {"Plugins": [name for name in packages if name in ours], "Contrib": ["contrib", *theirs]}
    return "".join(
        f"\n```{{toctree}}\n:hidden:\n:caption: {caption}\n\n" + "\n".join(names) + "\n```\n"
        for caption, names in groups.items()
    )


def build(target: Path) -> int:
    """Build the site in ``target``; returns Sphinx's exit status, which is not 0 after a warning."""
    with tempfile.TemporaryDirectory() as folder:
        assemble(Path(folder))
        options = ["--fail-on-warning", "--keep-going", "--quiet", "-c", str(DOCS), "-d", f"{folder}/.doctrees"]
        command = [sys.executable, "-m", "sphinx", *options, "-b", "html", folder, str(target)]
        return subprocess.run(command, check=False).returncode  # noqa: S603 - our own command


def main() -> None:
    """Build it where the command line says."""
    if len(sys.argv) > 2 or sys.argv[1:2] in (["-h"], ["--help"]):
        raise SystemExit(f"usage: {sys.argv[0]} [FOLDER]")
    target = Path(sys.argv[1]) if sys.argv[1:] else DOCS / "_site"
    if status := build(target):
        raise SystemExit(status)
    print(f"The site is in {target}: open {target / 'index.html'}.")


if __name__ == "__main__":
    main()
