"""The Python blocks of the guides and of this package's page run on two real ranks, as one script each."""

from importlib import util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
PAGES = ["docs/frameworks-lightning.md", "docs/frameworks-fabric.md", "plugins/commhub-lightning/README.md"]


@pytest.mark.skipif(util.find_spec("lightning") is None, reason="lightning is not installed here")
@pytest.mark.parametrize("page", PAGES)
def test_the_blocks_of_a_page_run(tmp_path, start, page):
    ended = start("page.py", ROOT / page, tmp_path / "run", ranks=2, logs=tmp_path)
    assert [code for code, _ in ended] == [0, 0], ended
    blocks = (ROOT / page).read_text(encoding="utf-8").count("```python\n")
    counts = [(tmp_path / "run" / f"{Path(page).stem}-rank{rank}.done").read_text() for rank in range(2)]
    assert counts == [str(blocks)] * 2
