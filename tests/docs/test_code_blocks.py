"""Every code block in the documentation that can run does run, on two real ranks.

The blocks of one page share a namespace, in their order, as a reader would type them. Where a page shows no model of
its own, `model` is a DistributedDataParallel one. A `pycon` block is a doctest. What is not run says why, in a comment
on the line above it: `<!-- not run: reason -->`.
"""

import doctest
import os
import re
from pathlib import Path

import pytest
from torch.nn.parallel import DistributedDataParallel

from commhub.testing import mlp

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    [
        ROOT / "README.md",
        ROOT / "commhub/drivers/README.md",
        *ROOT.glob("docs/*.md"),
        *ROOT.glob("plugins/*/README.md"),
        *ROOT.glob("contrib/*/README.md"),
    ]
)
_BLOCK = re.compile(r"(?P<not_run><!-- not run: [^>]+ -->\n)?^```(?P<language>\w*)\n(?P<code>.*?)^```$", re.S | re.M)
_RUN = ("python", "pycon")
_SHOWN = ("", "console", "sh", "text", "toml", "mermaid")


def blocks(page):
    """The blocks to run: (line in the page, language, code)."""
    text = page.read_text(encoding="utf-8")
    return [
        (text[: match.start("code")].count("\n"), match["language"], match["code"])
        for match in _BLOCK.finditer(text)
        if match["language"] in _RUN and not match["not_run"]
    ]


def run(page, found, folder):
    """On a rank: run a page's blocks one after the other."""
    os.chdir(folder)
    namespace = {"__name__": "__main__", "model": DistributedDataParallel(mlp())}
    for line, language, code in found:
        if language == "pycon":
            test = doctest.DocTestParser().get_doctest(code, namespace, page, page, line)
            runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
            report = []
            runner.run(test, out=report.append, clear_globs=False)
            namespace.update(test.globs)
            assert not report, "".join(report)
        else:
            exec(compile("\n" * line + code, page, "exec"), namespace)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda p: str(p.relative_to(ROOT)))
def test_the_blocks_of_a_page_run(ranks, tmp_path, page):
    ranks(run, 2, str(page.relative_to(ROOT)), blocks(page), str(tmp_path), timeout=120, fresh=True)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_block_has_a_language_that_says_whether_it_runs(page):
    text = page.read_text(encoding="utf-8")
    languages = [match["language"] for match in _BLOCK.finditer(text)]
    assert len(languages) == len(re.findall(r"^```", text, re.M)) / 2
    assert set(languages) <= {*_RUN, *_SHOWN}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_within_the_repository_lead_somewhere(page):
    targets = re.findall(r"\]\((?!https?:)([^)#]*)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    assert [target for target in targets if target and not (page.parent / target).exists()] == []
