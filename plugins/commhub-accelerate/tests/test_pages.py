"""The code blocks of the pages about Accelerate, the Trainer and PEFT, on two real ranks on the CPU."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize(("page", "blocks"), [("accelerate", 3), ("transformers", 3), ("peft", 1), ("readme", 1)])
def test_the_code_blocks_of_a_page_run(results, page, blocks):
    assert [count for count, _ in results(f"docs_{page}")] == [blocks] * 2


def test_the_script_for_peft_prints_what_its_page_shows(results):
    page = (ROOT / "docs/frameworks-peft.md").read_text(encoding="utf-8")
    (_, first), (_, second) = results("docs_peft")
    *_, figures, last = first.splitlines()
    assert figures.startswith("{'train_runtime': '")
    assert re.search(rf"^```text\n{{'train_runtime': '.*}}\n{re.escape(last)}\n```$", page, re.M)
    assert second == ""


def test_the_script_for_peft_goes_on_in_new_processes_as_if_nothing_had_been(results, same):
    for whole, resumed in results("docs_peft_resumed", "second"):
        for part in ("adapter", "optimizer", "hook"):
            assert same(whole[part], resumed[part]), part
        residuals = [value["local"] for value in whole["hook"].values()]
        assert not same(*residuals)
