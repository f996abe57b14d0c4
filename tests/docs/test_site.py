"""The site's pages are the repository's: all of them, linked as they are there."""

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def site():
    spec = importlib.util.spec_from_file_location("build_site", ROOT / "docs/build_site.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def assembled(site, tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    site.assemble(folder)
    return folder


def test_every_page_of_the_repository_is_there_and_in_the_contents(assembled):
    pages = {str(page.relative_to(assembled).with_suffix("")) for page in assembled.rglob("*.md")}
    packages = {f"packages/{path.parent.name}" for path in ROOT.glob("*/commhub-*/README.md")}
    assert {path.stem for path in ROOT.glob("docs/*.md")} | packages | {"index", "changelog", "drivers"} <= pages
    contents = (assembled / "index.md").read_text("utf-8").partition("{toctree}")[2].split()
    assert pages - {"index"} <= set(contents)


def test_links_lead_from_page_to_page(assembled):
    for page in assembled.rglob("*.md"):
        targets = re.findall(r"\]\((?!https?:|#)([^)#\s]+)", page.read_text("utf-8"))
        assert [target for target in targets if not (page.parent / target).resolve().is_relative_to(assembled)] == []
        assert [target for target in targets if not (page.parent / target).exists()] == []


@pytest.mark.parametrize(
    ("link", "words"), [("nowhere.md", "does not exist"), ("../pyproject.toml", "is no page of the site")]
)
def test_a_link_that_leads_nowhere_ends_the_build(site, tmp_path, monkeypatch, link, words):
    page = ROOT / "docs/hooks.md"
    monkeypatch.setattr(site, "pages", lambda: {page: "hooks"})
    monkeypatch.setattr(Path, "read_text", lambda *_: f"[a link]({link})")
    with pytest.raises(ValueError, match=words):
        site.assemble(tmp_path)
