"""Every code block in the documentation that can run does run, on two real ranks.

The blocks of one page share a namespace, in their order, as a reader would type them; with COMMHUB_EVERY_CHECK, they
have processes of their own too, where nothing is loaded but what they load. Where a page shows no model of
its own, `model` is a DistributedDataParallel one. A `pycon` block is a doctest. What is not run says why, in a comment
on the line above it: `<!-- not run: reason -->`.
"""

import contextlib
import doctest
import io
import os
import re
import runpy
import socket
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from torch.nn.parallel import DistributedDataParallel

import commhub
from commhub.cli import main
from commhub.registry._documented import owner
from commhub.testing import current, mlp

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    [
        ROOT / "README.md",
        ROOT / "contrib/README.md",
        ROOT / "commhub/drivers/HOW_IT_WORKS.md",
        *ROOT.glob("docs/*.md"),
        *ROOT.glob("plugins/*/README.md"),
        *ROOT.glob("contrib/*/README.md"),
    ]
)
_BLOCK = re.compile(
    r"(?P<not_run><!-- not run: [^>]+ -->\n)?^```(?P<language>[\w{}-]*)\n(?P<code>.*?)^```$", re.S | re.M
)
_RUN = ("python", "pycon")
_SHOWN = ("", "bash", "console", "diff", "text", "toml", "yaml", "{eval-rst}")


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
    fresh = "COMMHUB_EVERY_CHECK" in os.environ
    ranks(run, 2, str(page.relative_to(ROOT)), blocks(page), str(tmp_path), timeout=120, fresh=fresh)


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


def test_the_list_in_the_readme_is_what_the_command_prints():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    shown = re.search(r"^\$ commhub list\n(.*?)^```$", text, re.S | re.M)[1]
    documented = [row.name for row in commhub.installed() if owner(row.name) == row.distribution]
    printed = CliRunner().invoke(main, ["list"]).stdout
    columns = [re.split(r"\s{2,}", line) for line in printed.splitlines()]
    assert [re.split(r"\s{2,}", line) for line in shown.splitlines()] == [
        row for row in columns if row[0] in {"name", *documented}
    ]


@pytest.mark.parametrize("name", sorted(commhub.hooks()))
def test_the_example_that_info_shows_makes_the_hook(name):
    printed = CliRunner().invoke(main, ["info", name]).stdout
    shown = re.search(r'commhub.register\(model, "([^"]*)"', printed)[1]
    commhub.create(shown)


def run_script(path, port, *arguments):
    """On a rank: be what a launcher starts, a worker that is told by its environment where the ranks meet."""
    me = current()
    os.environ |= {"RANK": str(me.rank), "WORLD_SIZE": str(me.world_size), "MASTER_ADDR": "127.0.0.1"}
    os.environ["MASTER_PORT"] = str(port)
    sys.argv[:] = [path, *arguments]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        runpy.run_path(path, run_name="__main__")
    return printed.getvalue()


def free_port():
    """One that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_the_example_trains_on_two_ranks(ranks):
    script = str(ROOT / "docs/examples/train.py")
    first, second = ranks.fresh(run_script, 2, script, free_port(), init=False, timeout=120)
    assert (first.error, first.exitcode, second.error, second.exitcode) == (None, 0, None, 0)
    assert [line.partition("  ")[0] for line in first.value.splitlines()] == [f"step {n}" for n in range(10, 60, 10)]
    assert "2.0 times less" in first.value
    assert second.value == ""


@pytest.mark.parametrize("shards", ["2", "4"])
def test_the_sharded_example_trains_on_four_ranks(ranks, shards):
    script = str(ROOT / "docs/examples/sharded.py")
    results = ranks.fresh(run_script, 4, script, free_port(), "fp16", shards, init=False, timeout=120)
    assert [(r.error, r.exitcode) for r in results] == [(None, 0)] * 4
    assert [line.partition("  ")[0] for line in results[0].value.splitlines()] == ["step 10", "step 20", "step 30"]
    assert "2.0 times less" in results[0].value
    assert [r.value for r in results[1:]] == [""] * 3
