"""The Python blocks of the guides and of this package's page run on two real ranks, as one script each."""

from importlib import util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
PAGES = ["docs/frameworks-lightning.md", "docs/frameworks-fabric.md", "plugins/commhub-lightning/README.md"]


@pytest.mark.skipif(util.find_spec("lightning") is None, reason="lightning is not installed here")
def test_the_blocks_of_the_pages_run(tmp_path, start):
    pages = [ROOT / page for page in PAGES]
    ended = start("page.py", tmp_path / "run", *pages, ranks=2, logs=tmp_path)
    for page in pages:
        blocks = page.read_text(encoding="utf-8").count("```python\n")
        files = [tmp_path / "run" / f"{page.parent.name}-{page.stem}-rank{rank}.told" for rank in range(2)]
        assert all(file.exists() for file in files), ended
        assert [file.read_text() for file in files] == [str(blocks)] * 2
