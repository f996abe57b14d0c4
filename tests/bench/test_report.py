"""The report is one valid page with two charts that needs nothing but itself."""

import json
import re
from html.parser import HTMLParser

import pytest

pytest.importorskip("matplotlib", reason="the report is part of the bench extra")

from commhub._printable import visible
from commhub.bench._finish import finish
from commhub.bench._report import html

VOID = {"meta", "br", "hr", "img", "input", "link"}


class Page(HTMLParser):
    """Checks nesting, and collects tags, ids and what is referred to."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.ids, self.refers, self.text = [], [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.note(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.note(tag, attrs)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)

    def note(self, tag, attrs):
        self.tags.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value)
            self.refers += re.findall(r"url\(#(.*?)\)", value or "")
            if name in {"href", "xlink:href", "src"}:
                assert value.startswith("#"), f"{tag} loads {value}"
                self.refers.append(value[1:])


@pytest.fixture
def outcome(make_result, make_outcome):
    return make_outcome(
        make_result("allreduce"),
        make_result('odd("<&>")', (0.1,) * 8, compression=20.0),
        make_result("fp16", (0.2,) * 3, status="failed", error="HookError: <gone>", loss=None),
        make_result("bf16", (), status="not run", loss=None),
        link="100mbit, 1ms",
    )


def test_it_is_well_formed_and_its_references_are_its_own(outcome):
    page = Page(html(outcome))
    assert len(page.ids) == len(set(page.ids))
    assert set(page.refers) <= set(page.ids)


def test_it_names_no_address(outcome):
    assert not re.search(r"https?:|//\w|@import|<script|<link", html(outcome))


def test_it_has_two_charts_with_a_line_and_a_bar_for_each_hook_that_ran(outcome):
    text = html(outcome)
    assert Page(text).tags.count("svg") == 2
    loss, split = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    assert "training loss (nats per byte)" in loss
    assert "training time (s)" in loss
    assert all(part in split for part in ("compute", "encode", "wait", "decode"))
    assert all("odd(" in chart and "fp16" in chart and "bf16" not in chart for chart in (loss, split))


def test_it_says_how_it_was_run_and_escapes_what_it_shows(outcome):
    text = html(outcome)
    assert "odd(&quot;&lt;&amp;&gt;&quot;)" in text
    assert "HookError: &lt;gone&gt;" in text
    assert "Emulated link: 100mbit, 1ms" in text
    shown = " ".join(Page(text).text)
    assert all(word in shown for word in ("commhub bench --hooks", "2 cores", "torch 2.13.0", "Python 3.11.7"))


def test_without_a_step_it_has_no_charts(make_result, make_outcome):
    page = Page(html(make_outcome(make_result(times=(), status="failed", error="gone"))))
    assert "svg" not in page.tags


def test_the_first_losses_alone_can_be_drawn(make_result, make_outcome):
    page = Page(html(make_outcome(make_result(times=(0.1,), status="interrupted", loss=None))))
    assert page.tags.count("svg") == 2


def test_what_a_hook_said_is_printable(make_result, make_outcome, capsys, tmp_path):
    hostile = "\x1b[2J\u202e\udc80 gone"
    failed = make_result("fp16", status="failed", error=f"HookError: {hostile}")
    outcome = make_outcome(
        make_result("allreduce"), failed, report=str(tmp_path / "report.html"), json=str(tmp_path / "x")
    )
    assert finish(outcome, stopped=0) == 1
    for text in (capsys.readouterr().out, (tmp_path / "report.html").read_text()):
        assert r"\x1b[2J\u202e\udc80 gone" in text
        assert visible(text, keep="\n") == text
    assert json.dumps(hostile)[1:-1] in (tmp_path / "x").read_text()
